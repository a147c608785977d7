"""Explain the decisions of 3D convolutional neural networks on brain MRI. For research, not for diagnosis.

>>> import explainable_mri as xm
>>> model = xm.load_model("results/demo/fold-1")
>>> result = model.explain("scan.nii.gz", target="AD", covariates={"age": 74, "sex": "F", "tiv": 1410, "field_strength": 3})
>>> result.plot()
"""
__version__ = "0.1.0"

import lazy_loader

# The names and where they come from stand in __init__.pyi, for editors and for this module alike; each is imported on first use.
_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str):
    from .docstrings import complete_docstring

    return complete_docstring(_load(name))
