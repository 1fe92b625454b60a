from .loop import sweep as sweep
from .posterior import Posterior as Posterior
from .priors import Prior as Prior
from .report import report as report
from .runs import RunTable as RunTable
from .runs import read_runs as read_runs
from .sampling import fit as fit
from .specs import Target as Target

__version__: str
