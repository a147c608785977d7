"""Keras files: the logits of real ones, and the refusal of those that are damaged, made to mislead, or not understood."""

import gzip
import io
import json
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from explainable_mri.explainers.gradients import InputTimesGradient
from explainable_mri.explainers.lrp import LRP
from explainable_mri.models.keras import import_keras, load_keras, load_network
from explainable_mri.models.keras_layers import KerasError

DATA = Path(__file__).parent / "data" / "keras"
FILES = sorted(DATA.glob("*.gz"))


@pytest.fixture
def unpacked(tmp_path):
    "Unpack a file from the data folder, and read what goes with it."

    def unpack(packed: Path) -> tuple[Path, dict]:
        path = tmp_path / packed.stem
        path.write_bytes(gzip.decompress(packed.read_bytes()))
        return path, np.load(DATA / f"{Path(packed.stem).stem}.npz")

    return unpack


def load(path: Path):
    return load_keras(path, output="diagnosis" if "outputs" in path.name else None)


def input_of(network, values) -> torch.Tensor:
    x = torch.from_numpy(values["x"])
    return x if network.architecture.channels_first else x.movedim(-1, 1)


@pytest.mark.parametrize("packed", FILES, ids=lambda path: path.stem)
def test_logits_are_those_of_keras(packed, unpacked, tmp_path):
    path, expected = unpacked(packed)
    network = load(path)
    with torch.no_grad():
        logits = network(input_of(network, expected)).numpy()
    scale = max(1.0, np.abs(expected["logits"]).max())
    np.testing.assert_allclose(logits / scale, expected["logits"] / scale, atol=1e-5)
    import_keras(path, tmp_path / "native", output="diagnosis" if "outputs" in path.name else None)
    with torch.no_grad():
        np.testing.assert_allclose(load_network(tmp_path / "native")(input_of(network, expected)).numpy(), logits, atol=1e-5)


@pytest.mark.parametrize("name", ["separable", "transposed", "augmented", "outputs"])
def test_relevance_is_conserved(name, unpacked):
    "Without biases nothing absorbs relevance, and LRP-ε hands all of the logit on to the scan."
    path, values = unpacked(DATA / f"keras3-{name}.keras.gz")
    network = load(path).double()
    for module in network.modules():
        if getattr(module, "bias", None) is not None:
            torch.nn.init.zeros_(module.bias)
    x = input_of(network, values)[:1].double()
    relevance = LRP(network, "epsilon", epsilon=1e-9, convention="standard").attribute(x, 0)
    assert relevance.sum().item() == pytest.approx(network(x)[0, 0].item(), rel=1e-4)


@pytest.mark.parametrize("inner, weights", [
    ({"class_name": "TimeDistributed", "config": {"name": "each", "layer": {"class_name": "Conv1D", "config": {
        "name": "conv", "filters": 4, "kernel_size": 2, "use_bias": False, "activation": "relu"}}}}, (2, 2, 4)),
    ({"class_name": "Conv2D", "config": {"name": "each", "filters": 4, "kernel_size": 2, "use_bias": False, "data_format": "channels_first",
                                         "activation": "relu"}}, (2, 2, 3, 4)),
])
def test_relevance_is_conserved_through_turned_axes(inner, weights, tmp_path):
    rng = np.random.default_rng(0)
    count = 48 if inner["class_name"] == "TimeDistributed" else 16
    model = chain(inner, {"class_name": "Flatten", "config": {"name": "flat"}}, dense(use_bias=False), shape=(3, 5, 2))
    if inner["class_name"] == "Conv2D":
        count = 4 * 4 * 1
    arrays = {"each": {"kernel": rng.normal(size=weights).astype("f4")}, "out": {"kernel": rng.normal(size=(count, 2)).astype("f4")}}
    network = load_keras(write(tmp_path / "a.h5", model, arrays)).double()
    x = torch.from_numpy(rng.normal(size=(2, *network.input_shape)))
    relevance = LRP(network, "epsilon", epsilon=1e-9, convention="standard").attribute(x, 0)
    torch.testing.assert_close(relevance.sum((1, 2, 3)), network(x)[:, 0].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packed", [path for path in FILES if "operators" not in path.name], ids=lambda path: path.stem)
def test_every_network_can_be_explained(packed, unpacked):
    path, values = unpacked(packed)
    network = load(path)
    x = input_of(network, values)[:1]
    for explainer in (LRP(network, "epsilon", convention="standard"), LRP(network, "sequential_preset_a"), InputTimesGradient(network)):
        relevance = explainer.attribute(x, 0)
        assert relevance.shape == x.shape and torch.isfinite(relevance).all()
        assert relevance.any() or "normalizations" in path.name  # where α1β0 finds no positive contribution, by chance


def dense(name="out", units=2, **config):
    return {"class_name": "Dense", "config": {"name": name, "units": units} | config}


def chain(*layers, shape=(3,), name="chain"):
    first = {"class_name": "InputLayer", "config": {"name": "scan", "batch_input_shape": [None, *shape]}}
    return {"class_name": "Sequential", "config": {"name": name, "layers": [first, *layers]}}


def write(path, model, weights=None, version="2.15.0", **attributes):
    "A file as Keras 2 writes it; `weights` by layer and name."
    weights = {"out": {"kernel": np.ones((3, 2), "f4"), "bias": np.zeros(2, "f4")}} if weights is None else weights
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = model if isinstance(model, (str, bytes)) else json.dumps(model)
        file.attrs["keras_version"] = version
        file.attrs.update(attributes)
        for layer, arrays in weights.items():
            group = file.create_group(f"model_weights/{layer}")
            group.attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name in arrays]
            for name, array in arrays.items():
                group[f"{layer}/{name}:0"] = array
        file.require_group("model_weights")
    return path


def write_archive(path, model, weights=None, compression=zipfile.ZIP_STORED):
    "A file as Keras 3 writes it; `weights` by path."
    weights = {"layers/dense/vars/0": np.ones((3, 2), "f4"), "layers/dense/vars/1": np.zeros(2, "f4")} if weights is None else weights
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for place, array in weights.items():
            file[place] = array
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        archive.writestr("config.json", json.dumps(model))
        archive.writestr("model.weights.h5", content.getvalue())
    return path


def refused(path: Path, *words: str) -> str:
    "The message with which a file is refused, soon and without much memory."
    start = time.monotonic()
    with pytest.raises(KerasError) as caught:
        load_keras(path)
    message = str(caught.value)
    assert time.monotonic() - start < 5, "too slow"
    assert str(path) in message
    for word in words:
        assert word in message, message
    return message


def test_plain_files_are_read(tmp_path):
    for path in (write(tmp_path / "a.h5", chain(dense())), write_archive(tmp_path / "a.keras", chain(dense()))):
        assert load_keras(path)(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]


def test_whole_numbers_are_no_weights(tmp_path):
    kernel = np.full((3, 2), 127, np.int8)
    refused(write(tmp_path / "a.h5", chain(dense()), {"out": {"kernel": kernel, "bias": np.zeros(2, "f4")}}), "layer 'out'", "int8", "quantised")
    scaled = {"kernel": kernel, "bias": np.zeros(2, "f4"), "kernel_scale": np.ones(2, "f4")}
    refused(write(tmp_path / "b.h5", chain(dense()), {"out": scaled}), "expected 2 weights", "quantised")
    arrays = {f"layers/dense/vars/{index}": array for index, array in enumerate(scaled.values())}
    refused(write_archive(tmp_path / "c.keras", chain(dense()), arrays), "expected 2 weights, found 3")
    policy = {"class_name": "QuantizedDTypePolicy", "config": {"mode": "int8", "source_name": "float32"}}
    refused(write_archive(tmp_path / "d.keras", chain(dense(dtype=policy))), "quantised", "quantize()")


def test_a_failed_save_is_recognised(tmp_path):
    path = write(tmp_path / "a.h5", chain(dense()))
    with h5py.File(path, "a") as file:  # the array is announced, then the disk is full
        del file["model_weights/out/out/kernel:0"]
        file["model_weights/out/out"].create_dataset("kernel:0", (3, 2), "f4")
    refused(path, "kernel:0", "announced, but not written")
    path = write(tmp_path / "b.h5", chain(dense()))
    with h5py.File(path, "a") as file:
        del file["model_weights"]
    refused(path, "holds no weights")
    refused(write(tmp_path / "c.h5", chain(dense()), {"out": {"kernel": np.ones((3, 2), "f4")}}), "expected 2 weights (kernel, bias), found 1")
    path = write_archive(tmp_path / "d.keras", chain(dense()), {"layers/dense/vars/0": np.ones((3, 2), "f4")})
    refused(path, "its bias is not in the file")


def test_surplus_weights_are_refused(tmp_path):
    plain = {"kernel": np.ones((3, 2), "f4"), "bias": np.zeros(2, "f4")}
    refused(write(tmp_path / "a.h5", chain(dense()), {"out": plain, "other": plain}), "weights of 'other'")
    path = write(tmp_path / "b.h5", chain(dense()))
    with h5py.File(path, "a") as file:
        file["model_weights/out/out/gate:0"] = np.ones(2, "f4")
    refused(path, "found 2 and 3 arrays")
    lora = plain | {"lora_kernel_a": np.ones((3, 1), "f4"), "lora_kernel_b": np.ones((1, 2), "f4")}
    refused(write(tmp_path / "c.h5", chain(dense()), {"out": lora}), "LoRA")
    arrays = {"layers/dense/vars/0": plain["kernel"], "layers/dense/vars/1": plain["bias"], "layers/conv3d/vars/0": plain["bias"]}
    refused(write_archive(tmp_path / "d.keras", chain(dense()), arrays), "'layers/conv3d/vars/0', which belongs to no layer")
    del arrays["layers/conv3d/vars/0"]
    arrays |= {"optimizer/vars/0": np.int64(3), "layers/dropout/seed_generator/vars/0": np.array([1, 2], np.uint32)}
    assert load_keras(write_archive(tmp_path / "e.keras", chain(dense()), arrays))(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]


def test_a_layer_whose_name_begins_with_anothers_lies_in_its_group(tmp_path):
    "As in MobileNet, which has layers `Conv` and `Conv/BatchNorm`."
    weights = {"out": {"kernel": np.ones((3, 3), "f4"), "bias": np.zeros(3, "f4")},
               "out/more": {"kernel": np.ones((3, 2), "f4"), "bias": np.zeros(2, "f4")}}
    network = load_keras(write(tmp_path / "a.h5", chain(dense(units=3), dense("out/more")), weights))
    assert network(torch.ones(1, 3)).tolist() == [[9.0, 9.0]]


def test_weights_of_another_name_are_refused(tmp_path):
    swapped = {"beta": np.ones(3, "f4"), "gamma": np.ones(3, "f4"), "moving_mean": np.ones(3, "f4"), "spread": np.ones(3, "f4")}
    norm = {"class_name": "BatchNormalization", "config": {"name": "norm"}}
    refused(write(tmp_path / "a.h5", chain(norm), {"norm": swapped}), "stands where its")
    path = write_archive(tmp_path / "b.keras", chain(dense()))
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        group = file.create_group("layers/dense/vars")
        group.attrs["name"] = "another"
        group["0"], group["1"] = np.ones((3, 2), "f4"), np.zeros(2, "f4")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(chain(dense())))
        archive.writestr("model.weights.h5", content.getvalue())
    refused(path, "those of a layer 'another'")


def test_unknown_settings_and_foreign_classes_are_refused(tmp_path):
    refused(write(tmp_path / "a.h5", chain(dense(spectral=True))), "'spectral' is not known")
    load_keras(write(tmp_path / "b.h5", chain(dense(spectral=None, kernel_regularizer={"l2": 1}))))
    foreign = dense() | {"module": None, "registered_name": "Dense"}
    refused(write_archive(tmp_path / "c.keras", chain(foreign)), "'custom>Dense' is not supported")
    own = chain(dense()) | {"module": "my.models", "registered_name": "Sequential"}
    refused(write_archive(tmp_path / "d.keras", own), "'my.models.Sequential'", "Python code")
    refused(write(tmp_path / "e.h5", chain(dense()), backend="theano"), "theano", "2.15")


@pytest.mark.parametrize("kind", ["external file", "external link", "soft link", "virtual"])
def test_nothing_is_read_from_other_files(kind, tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["data"] = np.arange(6, dtype="f4").reshape(3, 2)
    path = write(tmp_path / "a.h5", chain(dense()))
    archive, content = tmp_path / "a.keras", io.BytesIO()

    def plant(file, place):
        if kind == "external file":
            (tmp_path / "raw").write_bytes(bytes(24))
            file.create_dataset(place, (3, 2), "f4", external=[(str(tmp_path / "raw"), 0, 24)])
        elif kind == "external link":
            file[place] = h5py.ExternalLink(str(secret), "/data")
        elif kind == "soft link":
            file["aside"] = np.ones((3, 2), "f4")
            file[place] = h5py.SoftLink("/aside")
        else:
            layout = h5py.VirtualLayout((3, 2), "f4")
            layout[:] = h5py.VirtualSource(str(secret), "data", (3, 2))
            file.create_virtual_dataset(place, layout)

    with h5py.File(path, "a") as file:
        del file["model_weights/out/out/kernel:0"]
        plant(file, "model_weights/out/out/kernel:0")
    refused(path, "kernel:0", "link" if "link" in kind else "another file")
    with h5py.File(content, "w") as file:
        file["layers/dense/vars/1"] = np.zeros(2, "f4")
        plant(file, "layers/dense/vars/0")
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("config.json", json.dumps(chain(dense())))
        zipped.writestr("model.weights.h5", content.getvalue())
    refused(archive, "vars/0", "link" if "link" in kind else "another file")


def nested(depth, width):
    "Models within models, each of which calls the next one `width` times."
    model = None
    for level in range(depth):
        layers = [{"class_name": "InputLayer", "name": "in", "config": {"name": "in", "batch_input_shape": [None, 3]}, "inbound_nodes": []}]
        inner = {"class_name": "Activation", "config": {"name": "inner", "activation": "relu"}} if model is None else dict(model)
        inner |= {"name": "inner", "inbound_nodes": [[["in", 0, 0, {}]], *([["inner", call, 0, {}]] for call in range(width - 1))]}
        layers.append(inner)
        model = {"class_name": "Functional", "config": {
            "name": "model", "layers": layers, "input_layers": [["in", 0, 0]], "output_layers": [["inner", width - 1, 0]]}}
    return model


@pytest.mark.parametrize("depth, width", [(8, 8), (3, 400), (200, 1), (1, 30_000)])
def test_deep_and_wide_graphs_are_refused(depth, width, tmp_path):
    refused(write_archive(tmp_path / "a.keras", nested(depth, width), {}))


@pytest.mark.parametrize("layers, words", [
    ([dense(units=10 ** 12)], "2,147,483,648"),
    ([dense(units=10 ** 30)], "cannot"),
    ([{"class_name": "Reshape", "config": {"name": "a", "target_shape": [3, 1]}},
      {"class_name": "UpSampling1D", "config": {"name": "b", "size": 10 ** 9}}], "layer 'b'"),
    ([{"class_name": "Reshape", "config": {"name": "a", "target_shape": [3, 1]}},
      {"class_name": "ZeroPadding1D", "config": {"name": "b", "padding": 2 ** 30}},
      {"class_name": "Conv1D", "config": {"name": "c", "filters": 2 ** 20, "kernel_size": 1}}], "layer 'b'"),
    ([{"class_name": "Flatten", "config": {"name": "x" * 10 ** 6}}], "characters"),
    ([{"class_name": "Flatten", "config": {"name": str(number)}} for number in range(30_000)], "layers"),
])
def test_sizes_are_bounded(layers, words, tmp_path):
    refused(write_archive(tmp_path / "a.keras", chain(*layers), {}))
    model, weights = chain(*layers), {}
    for layer in layers:
        if layer["class_name"] in ("Dense", "Conv1D"):  # weights that fit nothing
            weights[layer["config"]["name"]] = {"kernel": np.ones((3, 2), "f4"), "bias": np.zeros(2, "f4")}
    refused(write(tmp_path / "a.h5", model, weights), words)


def test_names_that_become_alike_stay_apart_and_are_quick(tmp_path):
    layers = [{"class_name": "Activation", "config": {"name": chr(0x4E00 + number), "activation": "relu"}} for number in range(5_000)]
    start = time.monotonic()
    load_keras(write_archive(tmp_path / "a.keras", chain(*layers), {}))
    assert time.monotonic() - start < 20


def test_bombs_are_not_unpacked(tmp_path):
    path = write(tmp_path / "a.h5", chain(dense(units=10 ** 8)), {})
    with h5py.File(path, "a") as file:
        group = file.create_group("model_weights/out")
        group.attrs["weight_names"] = [b"out/kernel:0", b"out/bias:0"]
        group.create_dataset("out/kernel:0", (3, 10 ** 8), "f4", chunks=(3, 10 ** 4), compression="gzip")
        group["out/bias:0"] = np.zeros(2, "f4")
    refused(path, "kernel:0", "announced")
    with h5py.File(path, "a") as file:
        del file["model_weights/out/out/kernel:0"]
        file.create_dataset("model_weights/out/out/kernel:0", data=np.zeros((3, 10 ** 7), "f4"), compression="gzip")
    refused(path, "kernel:0", "120,000,000 bytes")
    path = tmp_path / "b.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", json.dumps(chain(dense())))
        with archive.open("model.weights.h5", "w") as member:
            for _ in range(300):
                member.write(bytes(10 ** 6))
    refused(path, "model.weights.h5", "300,000,000 bytes")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b"[" * 10 ** 7)
        archive.writestr("model.weights.h5", b"")
    refused(path, "config.json")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"class_name":' * 100_000, "{", "null", '{"class_name": "Sequential", "config": 1e999}',
                                  json.dumps(chain(dense())) + " " * 2 ** 24, '{"a": ' + "9" * 10 ** 5 + "}"])
def test_descriptions_that_are_none(text, tmp_path):
    refused(write(tmp_path / "a.h5", text))


def test_several_inputs_and_outputs_are_named(tmp_path):
    path = tmp_path / "keras3-outputs.keras"
    path.write_bytes(gzip.decompress((DATA / "keras3-outputs.keras.gz").read_bytes()))
    refused(path, "2 outputs (age, diagnosis)", "output=")
    assert load_keras(path, output="age").shapes[load_keras(path, output="age").architecture.output] == (1,)
    with pytest.raises(KerasError, match="none of them 'sex'"):
        load_keras(path, output="sex")


def test_a_subclassed_model_gets_its_reason(tmp_path):
    model = {"module": None, "class_name": "My", "registered_name": "My", "config": {"trainable": True}}
    refused(write_archive(tmp_path / "a.keras", model), "'My' is not supported: its forward pass is Python code")
