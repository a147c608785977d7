"""Make the small Keras files in tests/data/keras and the logits that Keras gives, in two environments of their own:

    python3.11 -m venv keras2 && keras2/bin/pip install tensorflow-cpu==2.15.1
    keras2/bin/python tests/make_keras_files.py
    python3.12 -m venv keras3 && keras3/bin/pip install keras==3.15.1 "jax[cpu]" h5py
    KERAS_BACKEND=jax keras3/bin/python tests/make_keras_files.py
"""
import gzip
import os
import tempfile
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"

import numpy as np

try:
    import tensorflow
    keras = tensorflow.keras
    from keras import ops  # not in Keras 2
except ImportError:
    try:
        import keras
        from keras import ops
    except ImportError:
        ops = None

L, THREE = keras.layers, keras.__version__.startswith("3")
FOLDER = Path(__file__).parent / "data" / "keras"
RNG = np.random.default_rng(0)


def relu(x):
    return ops.relu(x) if THREE else tensorflow.nn.relu(x)


def mean(x, axis):
    return ops.mean(x, axis=axis) if THREE else tensorflow.reduce_mean(x, axis)


def operators():
    x = keras.Input((6, 5, 4, 1))
    a = L.Conv3D(3, 3, padding="same")(x / 255)
    b = L.Conv3D(3, 3, padding="same")(1 - x * 0.01)
    joined = relu(a + b) * 2 - a * b
    joined = -joined / 4 + 0.5
    return keras.Model(x, L.Dense(2)(mean(joined, (1, 2, 3))))


def normalizations():
    x = keras.Input((6, 5, 4, 2))
    y = L.Normalization(axis=-1)(L.Rescaling(0.1, 0.2)(x))
    y = L.LayerNormalization()(L.Conv3D(4, 3, activation="relu")(y))
    y = L.GroupNormalization(2)(y)
    y = L.LayerNormalization(axis=[1, 2, 3, 4], scale=False)(L.ReLU()(y))
    y = L.Normalization(axis=None, mean=0.3, variance=2.0)(L.BatchNormalization(axis=1)(y))
    return keras.Model(x, L.Dense(2)(L.Flatten()(L.GroupNormalization(-1, center=False)(y))))


def separable():
    x = keras.Input((9, 8, 2))
    y = L.SeparableConv2D(5, 3, strides=2, padding="same", depth_multiplier=2, activation="relu")(x)
    y = L.DepthwiseConv2D((2, 3), depth_multiplier=2, padding="same")(y)
    y = L.Reshape((-1, 10))(y)
    y = L.SeparableConv1D(4, 2, use_bias=False)(L.DepthwiseConv1D(3, padding="same", use_bias=False)(y))
    return keras.Model(x, L.Dense(2)(L.GlobalMaxPooling1D()(y)))


def transposed():
    x = keras.Input((4, 3, 3, 2))
    y = L.Conv3DTranspose(3, 3, strides=2, padding="same", activation="relu")(x)
    y = L.Conv3DTranspose(2, (2, 3, 4), strides=(3, 1, 2))(L.MaxPooling3D(2)(y))
    y = L.Conv3DTranspose(2, 4, padding="same", use_bias=False)(L.AveragePooling3D(2)(y))
    y = L.Conv3DTranspose(2, 1, strides=2, padding="same")(y)
    y = L.Reshape((-1, 8))(y)
    y = L.Conv1DTranspose(3, 4, strides=3, padding="same")(y)
    y = L.Conv2DTranspose(2, 3, strides=2)(L.Reshape((-1, 6, 1))(y))
    return keras.Model(x, L.Dense(2)(L.GlobalAveragePooling2D()(y)))


def time_distributed():
    block = keras.Sequential([keras.Input((5, 4, 2)), L.Conv2D(3, 2, activation="hard_sigmoid"), L.BatchNormalization(), L.Flatten()])
    x = keras.Input((3, 5, 4, 1))
    y = L.TimeDistributed(L.Conv2D(2, 3, padding="same", activation="relu"))(x)
    y = L.TimeDistributed(block)(L.TimeDistributed(L.BatchNormalization())(y))
    y = L.TimeDistributed(L.Dense(4, activation="relu"))(y)
    return keras.Model(x, L.Dense(2)(L.Flatten()(y)))


def augmented():
    layers = [L.RandomFlip(), L.RandomRotation(0.3), L.RandomZoom(0.2), L.RandomTranslation(0.1, 0.1), L.RandomContrast(0.2),
              L.RandomBrightness(0.2), L.GaussianNoise(0.3), L.GaussianDropout(0.3), L.AlphaDropout(0.3), L.SpatialDropout2D(0.3),
              L.Identity() if THREE else L.Activation("linear"), L.ActivityRegularization(0.1)]
    return keras.Sequential([keras.Input((6, 6, 1)), *layers, L.Conv2D(2, 3), L.Flatten(), L.Dropout(0.3), L.Dense(2)])


def outputs():
    scan = keras.Input((5, 5, 5, 1), name="scan")
    y = L.GlobalAveragePooling3D()(L.Conv3D(3, 3, activation="relu")(scan))
    return keras.Model({"scan": scan}, {"diagnosis": L.Dense(2)(y), "age": L.Dense(1)(y)})


def channels_first():
    x = keras.Input((2, 7, 6, 5))
    first = {"data_format": "channels_first"}
    y = L.BatchNormalization(axis=1)(L.Conv3D(3, 3, strides=2, padding="same", activation="relu", **first)(x))
    y = L.Concatenate(axis=1)([L.MaxPooling3D(2, strides=1, **first)(y), L.AveragePooling3D(2, strides=1, **first)(y)])
    y = L.GroupNormalization(2, axis=1)(L.Conv3DTranspose(4, 2, **first)(L.ZeroPadding3D(1, **first)(y)))
    y = L.LayerNormalization(axis=[1, 2, 3, 4])(L.UpSampling3D((1, 2, 1), **first)(y))
    return keras.Model(x, L.Dense(2)(L.concatenate([L.Flatten(**first)(y), L.GlobalMaxPooling3D(**first)(y)])))


def bfloat16():
    return keras.Sequential([keras.Input((5, 5, 1)), L.Conv2D(3, 3, dtype="bfloat16"), L.Flatten(), L.Dense(2, dtype="mixed_bfloat16")])


def randomize(model):
    "Give all weights values that matter."
    for variable in model.weights:
        if variable.dtype in ("int32", "int64") or "seed" in variable.name:
            continue
        values = RNG.normal(size=variable.shape, scale=0.5)
        variable.assign(np.abs(values) + 0.3 if "variance" in variable.name else values)
    for layer in model.layers:
        if isinstance(layer, L.Normalization):
            layer.finalize_state()


def reference(model, x):
    "The logits, of the first output by name where there are several, computed in single precision."
    if model.name == "bfloat16" or any("bfloat16" in str(getattr(layer, "dtype_policy", "")) for layer in model.layers):
        plain = keras.Sequential([keras.Input((5, 5, 1)), L.Conv2D(3, 3), L.Flatten(), L.Dense(2)])
        plain.set_weights([np.asarray(weight).astype(np.float32) for weight in model.get_weights()])
        return plain.predict(x, verbose=0)
    logits = model.predict(x, verbose=0)
    return logits["diagnosis"] if isinstance(logits, dict) else logits


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    networks = [operators, normalizations, separable, transposed, time_distributed, augmented, outputs]
    for make in networks + [channels_first, bfloat16] * THREE:
        model = make()
        randomize(model)
        shape = model.input_shape["scan"] if isinstance(model.input_shape, dict) else model.input_shape
        x = RNG.normal(size=(3, *shape[1:])).astype(np.float32)
        name = f"keras{keras.__version__[0]}-{make.__name__}"
        for suffix in (".h5", ".keras") if not (THREE and make is augmented) else (".keras",):  # Keras 3 cannot save it as .h5
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "model" + suffix)
                model.save(path)
                (FOLDER / f"{name}{suffix}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        np.savez_compressed(FOLDER / f"{name}.npz", x=x, logits=reference(model, x))
        print(name)


if __name__ == "__main__":
    main()
