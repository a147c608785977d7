from .config import load_config as load_config
from .data.volumes import Grid as Grid, Volume as Volume, load_volume as load_volume
from .errors import ExplainableMRIError as ExplainableMRIError
from .experiments.experiment import Experiment as Experiment
from .experiments.folder import load_cohort as load_cohort
from .explainers.base import build_explainer as build_explainer
from .explainers.lrp import LRP as LRP
from .inference import Explanation as Explanation, Model as Model, Prediction as Prediction, explain as explain, load_model as load_model
from .models.keras import load_keras as load_keras
from .registry import EXPLAINERS as EXPLAINERS, NETWORKS as NETWORKS
from .viewer.widget import view as view

__version__: str
