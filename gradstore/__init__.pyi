from .errors import GradstoreError as GradstoreError
from .explain.attribution import attribute as attribute
from .explain.attribution import attributions as attributions
from .explain.faithfulness import evaluate as evaluate
from .explain.forensics import forensics as forensics
from .explain.surrogate.kernel_glm import KernelGLM as KernelGLM
from .featurization.annotate_from import annotate_from_project as annotate_from_project
from .featurization.featurize import featurize as featurize
from .featurization.on_the_spot import featurize_queries as featurize_queries
from .kernels.exact.exact_gram import exact_gram as exact_gram
from .kernels.gram import gram as gram
from .kernels.residual import residual as residual
from .model.huggingface import huggingface as huggingface
from .model.image_and_text import image as image
from .model.image_and_text import text as text
from .model.project import Project as Project
from .model.project import load_project as load_project
from .projection.projection import Projection as Projection
from .search.session import Session as Session
from .search.topk import topk as topk
from .store.annotate import annotate as annotate
from .store.concatenated import concat as concat
from .store.feature_store import open as open
from .store.present_rows import present_rows as present_rows
from .store.remove import remove as remove
from .store.rows import Rows as Rows

__version__: str
