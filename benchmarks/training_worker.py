"""Time steps and epochs of a training: run by training.py, which asks it round by round through its standard input.

Usage: python training_worker.py keras|ours NETWORK PRECISION THREADS; then lines "step N" and "epoch SCANS", each answered by a line of JSON.
"""
import json
import os
import sys
import time

import numpy as np

SHAPE, BATCH = (100, 120, 100), 20


def keras_network(name: str):
    "The published CNN, or the group's ResNet, as the group writes it in Keras."
    from tensorflow.keras import Model, layers, regularizers

    def conv(x, activation=None):
        return layers.Conv3D(5, 3, padding="same", activation=activation)(x)

    volume = layers.Input((*SHAPE, 1))
    if name == "dyrba2021":
        x = volume
        for _ in range(3):
            x = layers.BatchNormalization()(layers.MaxPooling3D(2)(conv(x, "relu")))
        x = layers.Dense(64, activation="relu")(layers.Dropout(0.1)(layers.Flatten()(x)))
        x = layers.Dense(32, activation="relu", kernel_regularizer=regularizers.l2(0.01))(layers.Dropout(0.1)(x))
        return Model(volume, layers.Dense(2, activation="softmax", kernel_regularizer=regularizers.l2(0.01))(layers.Dropout(0.1)(x)))

    def block(x, convolutions):
        y = x
        for half in (1, 2):
            for _ in range(convolutions):
                y = conv(y)
            y = layers.BatchNormalization()(y)
            if half == 1:
                y = layers.ReLU()(layers.MaxPooling3D(2)(y))
        y = layers.Add()([y, layers.MaxPooling3D(2)(x)])
        return layers.ReLU()(layers.MaxPooling3D(2)(y))

    x = layers.Dropout(0.3)(block(block(volume, 2), 3))
    return Model(volume, layers.Dense(2, activation="softmax")(layers.Flatten()(x)))


class Keras:
    "Steps and epochs of Keras."

    def __init__(self, name: str, precision: str, threads: int):
        os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["TF_ENABLE_ONEDNN_OPTS"] = "3", "1"
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        if precision == "bfloat16":
            tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
        self.network = keras_network(name)
        self.network.compile(tf.keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")

    def step(self, volumes: np.ndarray, labels: np.ndarray) -> None:
        self.network.train_on_batch(volumes[..., None], labels)

    def epoch(self, volumes: np.ndarray, labels: np.ndarray) -> float:
        start = time.perf_counter()
        self.network.fit(volumes[..., None], labels, batch_size=BATCH, epochs=1, verbose=0)
        return time.perf_counter() - start


class Ours:
    "Steps and epochs of this package."

    def __init__(self, name: str, precision: str, threads: int):
        import torch

        from explainable_mri.config import Component, TrainingConfig
        from explainable_mri.models.networks import build_network
        from explainable_mri.training.trainer import prepared_for_training

        torch.set_num_threads(threads)
        self.torch, self.component = torch, Component(name=name)
        self.config = TrainingConfig(epochs=2, batch_size=BATCH, learning_rate=1e-4, accelerator="cpu",
                                     precision="bf16-mixed" if precision == "bfloat16" else "32-true")
        network = build_network(self.component, SHAPE)
        self.network = network if precision == "plain" else prepared_for_training(network, self.config, "cpu", SHAPE).__enter__()
        if precision == "plain":
            network.to(memory_format=torch.channels_last_3d)
        self.optimizer = torch.optim.Adam(network.parameters(), 1e-4)

    def step(self, volumes: np.ndarray, labels: np.ndarray) -> None:
        from explainable_mri.models.networks import l2_penalty

        torch = self.torch
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16-mixed"):
            outputs = self.network(torch.from_numpy(volumes)[:, None])
            loss = torch.nn.functional.cross_entropy(outputs.float(), torch.from_numpy(labels)) + l2_penalty(self.network)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def epoch(self, volumes: np.ndarray, labels: np.ndarray) -> float:
        import tempfile

        from explainable_mri.data.datasets import ScanDataset
        from explainable_mri.training.trainer import read_history, train

        with tempfile.TemporaryDirectory() as folder:
            few = ScanDataset(volumes[:2], labels[:2])  # hardly any validation, which Keras is not asked for either
            train(self.component, ScanDataset(volumes, labels), few, self.config, folder)
            return float(read_history(folder).seconds.iloc[-1])


def main(peer: str, name: str, precision: str, threads: int) -> None:
    "Answer each line of the standard input."
    rng = np.random.default_rng(0)
    volumes, labels = rng.random((BATCH, *SHAPE), dtype=np.float32), np.arange(BATCH) % 2
    worker = (Keras if peer == "keras" else Ours)(name, precision, threads)
    worker.step(volumes, labels)  # warms up
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        what, number = line.split()
        if what == "epoch":
            scans = np.concatenate([volumes] * (int(number) // BATCH))
            seconds = [worker.epoch(scans, np.arange(len(scans)) % 2)]
        else:
            seconds = []
            for _ in range(int(number)):
                start = time.perf_counter()
                worker.step(volumes, labels)
                seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
