"""For JupyterLab started in this folder: notebooks are cleaned as they are saved, so that saving one untouched changes nothing."""
from nbdev.clean import clean_jupyter

c.FileContentsManager.pre_save_hook = clean_jupyter  # Jupyter defines c
