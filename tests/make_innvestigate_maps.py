"""Make the small networks and maps in tests/data/innvestigate, in an environment of its own:

    python -m venv tf && tf/bin/pip install tensorflow-cpu==2.15.1 future matplotlib tqdm pillow
    tf/bin/pip install --no-deps innvestigate==2.1.2
    tf/bin/python tests/make_innvestigate_maps.py
"""
import gzip
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # of equal values in a window the first has the gradient, as in the references

import numpy as np
import tensorflow as tf

tf.compat.v1.disable_eager_execution()
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)

import innvestigate
from tensorflow import keras
from tensorflow.keras import layers as L

FOLDER = Path(__file__).parent / "data" / "innvestigate"
ANALYZERS = [
    ("gradient", {}), ("input_t_gradient", {}), ("guided_backprop", {}), ("integrated_gradients", {"steps": 8}),
    ("lrp.z", {}), ("lrp.epsilon", {"epsilon": 0.01}), ("lrp.w_square", {}), ("lrp.flat", {}),
    ("lrp.alpha_2_beta_1", {}), ("lrp.alpha_1_beta_0_IB", {}), ("lrp.z_plus_fast", {}),
    ("lrp.sequential_preset_a", {"epsilon": 1e-10}), ("lrp.sequential_preset_b_flat", {"epsilon": 1e-10}),
    ("lrp.sequential_preset_b_flat_until_idx", {"until_layer_idx": 3, "epsilon": 1e-10}),
    ("deep_taylor", {}), ("deep_taylor.bounded", {"low": -1.0, "high": 1.0})]


def functional(shape, *blocks):
    "A network with two or three classes from functions of a tensor."
    scan = x = L.Input(shape)
    for block in blocks:
        x = block(x)
    return keras.Model(scan, x)


def head(classes=3):
    return L.Dense(classes, activation="softmax")


def residual(x):
    y = L.BatchNormalization()(L.Conv3D(3, 3, padding="same")(x))
    y = L.Conv3D(3, 3, padding="same")(L.Activation("relu")(y))
    return L.Activation("relu")(L.Add()([L.Conv3D(3, 1)(x), L.BatchNormalization()(y)]))


def dense_block(x):
    for _ in range(2):
        y = L.Conv3D(2, 3, padding="same")(L.ReLU()(L.BatchNormalization()(x)))
        x = L.Concatenate()([x, y])
    return x


def joined(x):
    first, second = L.Conv2D(3, 3, padding="same", activation="relu")(x), L.Conv2D(3, 2, padding="same", activation="relu")(x)
    gate = L.Conv2D(3, 1, activation="sigmoid")(x)
    return L.Concatenate()([L.Multiply()([first, gate]), L.Average()([first, second]), L.Maximum()([first, second]),
                            L.Minimum()([first, second]), L.Subtract()([first, second])])


def shared(x):
    convolution, activation = L.Conv2D(3, 3, padding="same"), L.Activation("relu")
    x = activation(L.Conv2D(3, 3, padding="same")(x))
    return L.Add()([activation(convolution(x)), activation(convolution(activation(convolution(x))))])


def nested(x):
    "A model that is used as a layer."
    scan = L.Input(x.shape[1:])
    y = L.ReLU()(L.BatchNormalization()(L.Conv2D(3, 3, padding="same")(scan)))
    y = L.Conv2D(3, 2, padding="same", activation="relu")(L.Add()([y, y, scan]))
    return keras.Model(scan, L.AveragePooling2D(2)(y))(x)


def repeated(x):
    "Layers that a tensor enters twice."
    x = L.Add()([x, L.Conv2D(3, 3, padding="same")(x), x])
    return L.Concatenate()([x, L.BatchNormalization()(x), x])


NETWORKS = {
    "strides": lambda: keras.Sequential([
        L.InputLayer((9, 10, 1)), L.Conv2D(4, (3, 4), strides=(2, 3), padding="same", activation="relu"),
        L.Conv2D(4, 2, dilation_rate=2, padding="same", activation="relu"), L.Conv2D(3, 3, strides=2, padding="same"),
        L.Activation("relu"), L.Flatten(), L.Dense(5, activation="relu"), head()]),
    "pooling": lambda: keras.Sequential([
        L.InputLayer((5, 6, 5, 1)), L.Conv3D(3, 2, activation="relu"), L.MaxPooling3D(2, padding="same", strides=1),
        L.AveragePooling3D(2, padding="same"), L.Conv3D(3, 2, padding="same", activation="relu"),
        L.MaxPooling3D((2, 3, 2), padding="same"), L.Flatten(), head()]),
    "normalization": lambda: keras.Sequential([
        L.InputLayer((4, 5, 6, 1)), L.Conv3D(3, 3, padding="same", activation="relu"), L.BatchNormalization(),
        L.Conv3D(3, 3, padding="same"), L.BatchNormalization(scale=False), L.Activation("relu"), L.Flatten(),
        L.Dense(6), L.BatchNormalization(center=False), L.Activation("relu"), head(2)]),
    "activations": lambda: keras.Sequential([
        L.InputLayer((40, 2)), L.Conv1D(4, 5, activation="tanh"), L.LeakyReLU(0.2), L.Conv1D(4, 3, strides=2),
        L.ELU(0.7), L.Conv1D(4, 3), L.PReLU(shared_axes=[1]), L.Conv1D(4, 3), L.ReLU(max_value=2.0),
        L.GlobalAveragePooling1D(), head()]),
    "residual": lambda: functional((4, 5, 5, 1), residual, L.MaxPooling3D(2), residual, L.Flatten(), head(2)),
    "densenet": lambda: functional((5, 5, 4, 1), L.Conv3D(2, 3, padding="same"), dense_block, L.AveragePooling3D(2), dense_block,
                                   L.ReLU(), L.GlobalAveragePooling3D(), head(2)),
    "joins": lambda: functional((9, 8, 1), joined, L.MaxPooling2D(2), L.Flatten(), head()),
    "shapes": lambda: functional(
        (6, 7, 2), L.Permute((2, 1, 3)), L.Conv2D(3, 3, activation="relu"), L.ZeroPadding2D(((1, 0), (0, 2))), L.UpSampling2D(2),
        L.Conv2D(3, 3, activation="relu"), L.Cropping2D(((1, 0), (2, 1))), L.Dense(2, activation="relu"),
        L.Reshape((-1, 6)), L.Conv1D(4, 3, activation="relu"), L.Flatten(), head()),
    "shared": lambda: functional((10, 9, 1), shared, L.GlobalMaxPooling2D(), L.Dense(4, activation="relu"), head()),
    "nested": lambda: functional((8, 9, 1), L.Conv2D(3, 3, padding="same", activation="relu"), nested, L.BatchNormalization(),
                                 repeated, L.Flatten(), head()),
    "trained": lambda: keras.Sequential([
        L.InputLayer((5, 6, 5, 1)), L.Conv3D(4, 3, padding="same", activation="relu"), L.MaxPooling3D(2),
        L.SpatialDropout3D(0.1), L.BatchNormalization(), L.Flatten(), L.Dropout(0.1), L.Dense(6, activation="relu"), head(2)]),
}


def randomize(model, rng):
    "Give biases and batch normalisation values that a trained network could have."
    for layer in model.layers:
        for variable in layer.weights:
            kind, shape = variable.name.split("/")[-1].split(":")[0], variable.shape
            if kind == "moving_variance":
                keras.backend.set_value(variable, rng.uniform(0.2, 2.5, shape))
            elif kind in ("bias", "beta", "moving_mean", "alpha", "gamma"):
                keras.backend.set_value(variable, rng.normal(0.7 * (kind == "gamma"), 0.3, shape))


def make_inputs(shape, kind, rng, count=2):
    "A batch of positive numbers, of numbers of both signs, or of positive ones in a background of zeros."
    x = rng.normal(size=(count, *shape)) if kind == "signed" else rng.random((count, *shape))
    if kind == "background":
        x[:, : shape[0] // 3] = 0
        x[:, :, -2:] = 0
    return x.astype(np.float32)


def main(names):
    "Write NAME.hdf5.gz and NAME.npz for each network, or for those named."
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(), "network.hdf5")
    for number, name in enumerate(NETWORKS):
        if names and name not in names:
            continue
        keras.backend.clear_session()
        keras.utils.set_random_seed(number)
        rng, model = np.random.default_rng(number), NETWORKS[name]()
        kind = ("positive", "signed", "background")[number % 3]
        x, classes = make_inputs(model.input_shape[1:], kind, rng), model.output_shape[-1]
        randomize(model, rng)
        if name == "trained":
            many = make_inputs(model.input_shape[1:], kind, rng, 40)
            labels = (many[:, :3].mean((1, 2, 3, 4)) > many[:, 3:].mean((1, 2, 3, 4))).astype(int)
            model.compile("adam", "sparse_categorical_crossentropy")
            model.fit(many, labels, epochs=20, verbose=0)
        model.save(path, include_optimizer=False)
        (FOLDER / f"{name}.hdf5.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        neurons = [int(one) for one in rng.integers(classes, size=len(x))]
        results = {"x": x, "neurons": np.array(neurons)}
        for analyzer, parameters in ANALYZERS:
            if name == "nested" and "gradient" in analyzer:
                continue  # iNNvestigate counts the path of a repeated input twice, which is not the gradient
            keras.backend.clear_session()  # iNNvestigate grows the graph, and with it slows down
            keras.backend.set_learning_phase(0)
            loaded = keras.models.load_model(path, compile=False)
            loaded = keras.Model(loaded.inputs, loaded.outputs)  # a Sequential does not list its input
            for layer in loaded._flatten_layers(include_self=False):  # iNNvestigate adds layers of its own, whose names could clash
                layer._name = f"network_{layer.name}"
            network = innvestigate.model_wo_softmax(loaded)
            results["logits"] = network.predict(x)
            try:
                maps = innvestigate.create_analyzer(analyzer, network, neuron_selection_mode="index",
                                                    disable_model_checks=True, **parameters).analyze(x, neuron_selection=neurons)
            except Exception as error:  # it does not know every layer
                print(f"{name}: iNNvestigate refuses {analyzer} ({type(error).__name__}: {str(error)[:90]})", flush=True)
                continue
            results[f"{analyzer}|{json.dumps(parameters)}"] = maps.astype(np.float32)
        np.savez_compressed(FOLDER / f"{name}.npz", **results)
        print(name, len(results) - 3, "maps", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
