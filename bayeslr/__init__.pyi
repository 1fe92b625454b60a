from bayeslr.loop import sweep as sweep
from bayeslr.posterior import Posterior as Posterior
from bayeslr.priors import Prior as Prior
from bayeslr.report import report as report
from bayeslr.runs import RunTable as RunTable
from bayeslr.runs import read_runs as read_runs
from bayeslr.sampling import fit as fit
from bayeslr.specs import Target as Target

__version__: str
