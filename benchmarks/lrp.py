"""Time a relevance map of the group's networks: ours, iNNvestigate, Zennit and Captum, side by side in one run.

    python benchmarks/lrp.py --networks ../shared/reference/keras_group

Each peer runs in a process of its own, one after the other and several rounds of it, so that a busy moment of the machine
hits all alike. iNNvestigate needs an old TensorFlow: the script makes an environment for it in `.benchmarks/`, and fetches
Zennit there too. The result, a table, goes to `benchmarks/RESULTS.md`.
"""
import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
from results import write_section
from torch import nn

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".benchmarks"
NETWORKS = ("alexnet", "resnet", "densenet")
PEERS = ("ours", "iNNvestigate", "Zennit", "Captum")
TARGET, EPSILON = 1, 1e-10


# ---- the peers in PyTorch, each in its own process --------------------------------------------------------------------


def our_maps(network: nn.Module):
    "Our `lrp.sequential_preset_a`."
    from explainable_mri.explainers.base import build_explainer

    explainer = build_explainer("lrp.sequential_preset_a", network, epsilon=EPSILON)
    return lambda inputs: explainer.attribute(inputs, target=TARGET)


def zennit_maps(network: nn.Module):
    "Zennit's nearest composite: epsilon in dense layers, z+ (α1β0, with positive bias only) in convolutions."
    torchvision = types.ModuleType("torchvision")  # Zennit imports torchvision's VGG and ResNet, which are not used here
    for name in ("models", "models.vgg", "models.resnet"):
        module = types.ModuleType(f"torchvision.{name}")
        module.VGG = module.ResNet = module.Bottleneck = module.BasicBlock = type("Unused", (nn.Module,), {})
        sys.modules[f"torchvision.{name}"] = module
    sys.modules["torchvision"] = torchvision
    sys.path.insert(0, str(FOLDER / "zennit"))
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlus

    def attribute(inputs):
        with Gradient(network, EpsilonPlus(epsilon=EPSILON)) as attributor:
            logits = network(inputs).detach()
            return attributor(inputs, torch.eye(logits.shape[1], device=inputs.device)[[TARGET]] * logits)[1]

    return attribute


def captum_maps(network: nn.Module):
    "Captum's LRP with the rules set by hand: epsilon in dense layers, α1β0 in convolutions, epsilon elsewhere."
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule

    def attribute(inputs):
        for module in network.modules():  # Captum forgets the rules after each map
            if isinstance(module, nn.Conv3d):
                module.rule = Alpha1_Beta0_Rule()
            elif not isinstance(module, nn.ReLU | nn.Dropout) and not list(module.children()):
                module.rule = EpsilonRule(epsilon=EPSILON)  # through ReLU and dropout Captum passes relevance by itself
        return LRP(network).attribute(inputs, target=TARGET)

    return attribute


def work(peer: str, model: Path, scan: Path, repeats: int, device: str, map_path: Path) -> dict:
    "Time one of the PyTorch peers; the first map is not counted."
    from importlib.metadata import version

    from explainable_mri.models.keras import load_keras

    network = load_keras(model).to(device)
    inputs = torch.from_numpy(np.load(scan)["x"].astype(np.float32))[None, None].to(device)
    attribute = {"ours": our_maps, "Zennit": zennit_maps, "Captum": captum_maps}[peer](network)
    relevance = attribute(inputs.clone().requires_grad_(peer != "ours"))
    np.savez_compressed(map_path, relevance=relevance.detach().cpu().numpy()[0, 0])

    def times(call) -> list[float]:
        seconds = []
        for _ in range(repeats):
            fresh = inputs.clone().requires_grad_(peer != "ours")
            _wait(device)
            start = time.perf_counter()
            call(fresh)
            _wait(device)
            seconds.append(time.perf_counter() - start)
        return seconds

    maps = times(attribute)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with torch.inference_mode():
        network(inputs)
        forward = times(lambda _: network(inputs))
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    package = {"ours": "explainable-mri", "Zennit": "zennit", "Captum": "captum"}[peer]
    return {"version": f"{peer} {_version(package)}, PyTorch {torch.__version__}", "map": maps, "forward": forward,
            "peak_memory": memory}


def _version(package: str) -> str:
    from importlib.metadata import version

    if package == "explainable-mri":
        from explainable_mri import __version__
        return __version__
    return version(package)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- the environments --------------------------------------------------------------------------------------------------


def make_environments() -> Path:
    "Install iNNvestigate with its TensorFlow, and Zennit, below `.benchmarks/`; return the former's Python."
    environment, zennit = FOLDER / "innvestigate", FOLDER / "zennit"
    python = environment / "bin" / "python"
    if not (environment / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        for packages in (["tensorflow-cpu==2.15.1", "future", "matplotlib", "tqdm", "pillow"],
                         ["--no-deps", "innvestigate==2.1.2"]):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (environment / "ready").touch()
    if not zennit.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(zennit),
                        "zennit==0.5.1"], check=True)
    return python


# ---- the comparison ------------------------------------------------------------------------------------------------------


def measure(peer: str, model: Path, scan: Path, repeats: int, device: str, map_path: Path, python: Path) -> dict | None:
    "Run a peer in its own process; None where it fails, with its last words."
    if peer == "iNNvestigate":
        command = [python, Path(__file__).with_name("innvestigate_worker.py"), model, scan, repeats, map_path]
    else:
        command = [sys.executable, __file__, "--worker", peer, "--model", model, "--scan", scan, "--repeats", repeats,
                   "--device", device, "--map", map_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if result.returncode:
        print(f"    {peer} failed: {result.stderr.strip().splitlines()[-1][:300]}", flush=True)
        return None
    return json.loads(result.stdout.strip().splitlines()[-1])


def compare(model: Path, scan: Path, repeats: int, rounds: int, device: str, python: Path) -> dict[str, dict]:
    "Measure all peers on one network, `rounds` times in turn."
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for peer in PEERS:
                if number and peer not in results:
                    continue
                few = repeats if peer in ("ours", "iNNvestigate") else 1  # a map of the others takes many seconds
                result = measure(peer, model, scan, few, device, Path(folder, f"{peer}.npz"), python)
                if result is None:
                    continue
                print(f"    round {number + 1}: {peer:13} {statistics.median(result['map']):.3f} s a map", flush=True)
                entry = results.setdefault(peer, {"version": result["version"], "map": [], "forward": [], "peak_memory": 0})
                entry["map"] += result["map"]
                entry["forward"] += result["forward"]
                entry["peak_memory"] = max(entry["peak_memory"], result["peak_memory"])
        maps = {peer: np.load(Path(folder, f"{peer}.npz"))["relevance"] for peer in results}
    if "iNNvestigate" in maps:
        reference = maps["iNNvestigate"]
        for peer, relevance in maps.items():
            results[peer]["difference"] = float(np.linalg.norm(relevance - reference) / np.linalg.norm(reference))
    return results


def table(results: dict[str, dict[str, dict]]) -> str:
    "The results as Markdown."
    lines = ["| network | implementation | seconds a map (median) | fastest | ÷ ours | ÷ own forward pass | peak memory (GB) "
             "| difference from iNNvestigate |", "|---|---|---|---|---|---|---|---|"]
    for network, peers in results.items():
        ours = statistics.median(peers["ours"]["map"])
        for peer, result in peers.items():
            seconds = statistics.median(result["map"])
            difference = f"{result['difference']:.1e}" if "difference" in result else "–"
            lines.append(f"| {network} | {peer} | {seconds:.3f} | {min(result['map']):.3f} | {seconds / ours:.2f} | "
                         f"{seconds / statistics.median(result['forward']):.1f} | {result['peak_memory'] / 1e9:.2f} | {difference} |")
    return "\n".join(lines)


def write_results(text: str, device: str, versions: list[str], repeats: int, rounds: int) -> None:
    "Replace this benchmark's section of RESULTS.md."
    processor = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    write_section(f"lrp-{device}",
                  f"## LRP on the group's networks, {device.upper()}\n\n"
                  f"`python benchmarks/lrp.py --device {device}`, {datetime.date.today()}, {processor}; `lrp.sequential_preset_a`, "
                  f"ε = 1e-10, class 1, volume of 179×169×208 voxels, batch 1. Rounds: {rounds}; maps a round: {repeats} (Zennit and Captum: 1); each peer in its own process, "
                  f"graphs and tracing excluded. TensorFlow's times depend much on the processor: for the DenseNet 0.68 s a map were seen on another machine."
                  f"\n\n{text}\n\nVersions: {'; '.join(versions)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=Path, default=ROOT.parent / "shared" / "reference" / "keras_group",
                        help="folder with alexnet_cv8.hdf5, resnet_cv8.hdf5, densenet_cv8.hdf5 and x.npz")
    parser.add_argument("--repeats", type=int, default=5, help="maps a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all implementations")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device of the PyTorch implementations")
    for name in ("--worker", "--model", "--scan", "--map"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, Path(options.model), Path(options.scan), options.repeats, options.device,
                              Path(options.map))))
        return
    if not (options.networks / "x.npz").exists():
        sys.exit(f"There is no {options.networks / 'x.npz'}. Name the folder with the group's networks: --networks FOLDER")
    python, results = make_environments(), {}
    for name in NETWORKS:
        print(f"{name}", flush=True)
        results[name] = compare(options.networks / f"{name}_cv8.hdf5", options.networks / "x.npz", options.repeats,
                                options.rounds, options.device, python)
    text = table(results)
    print(text)
    versions = sorted({result["version"] for peers in results.values() for result in peers.values()})
    write_results(text, options.device, versions, options.repeats, options.rounds)


if __name__ == "__main__":
    main()
