"""Which channels must be pruned together: the model is traced on labels, and dependency groups follow from it.

`tracing` runs the label `probe` and returns the `connectivity`, from which `groups` couples what must go together.
`layers` knows where each kind of layer has its channels, `exclusions` says what stays, and why.
"""

from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import Coupling, couple
from ss_pruning.graph.traced import TracedModel
from ss_pruning.graph.tracing import trace

__all__ = ["Connectivity", "Coupling", "TracedModel", "couple", "trace"]
