"""Time iNNvestigate on a Keras network: run by lrp.py inside the TensorFlow environment that it makes.

Usage: python innvestigate_worker.py MODEL.hdf5 INPUT.npz REPEATS OUT.npz; prints one line of JSON.
"""
import json
import os
import resource
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# Off by default on processors without AVX-512, where it makes TensorFlow several times as fast.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"

import numpy as np
import tensorflow as tf

tf.compat.v1.disable_eager_execution()

import innvestigate


def main(model_path: str, input_path: str, repeats: int, map_path: str) -> None:
    "Build the analyzer, then time forward passes and maps."
    volume = np.load(input_path)["x"].astype(np.float32)[None, ..., None]
    model = tf.keras.models.load_model(model_path, compile=False)
    for layer in model.layers:  # iNNvestigate adds layers of its own, whose names could clash with the network's
        layer._name = f"network_{layer.name}"
    network = innvestigate.model_wo_softmax(model)
    start = time.perf_counter()
    # Networks with ReLU layers are analysed only with the model checks off, as the reference maps were made.
    analyzer = innvestigate.create_analyzer("lrp.sequential_preset_a", network, epsilon=1e-10,
                                            neuron_selection_mode="index", disable_model_checks=True)
    relevance = analyzer.analyze(volume, 1)
    build = time.perf_counter() - start
    network.predict(volume)

    def times(call) -> list[float]:
        "Seconds of each of `repeats` calls."
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        return seconds

    maps, forward = times(lambda: analyzer.analyze(volume, 1)), times(lambda: network.predict_on_batch(volume))
    np.savez_compressed(map_path, relevance=relevance[0, ..., 0])
    print(json.dumps({
        "version": f"iNNvestigate 2.1.2, TensorFlow {tf.__version__}", "build": build, "map": maps, "forward": forward,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
