"""Condenser with a contrast between spans: two spans of one passage are drawn together, those of other passages apart.

Source: coCondenser, arXiv 2108.05540, section 3.2: masked LM of encoder and head, plus a contrast of the late [CLS] vectors of all spans of
a step; section 3.3: gradient caching.
Differs: the spans are the two sides of a cut in one passage, as the store knows no longer documents; cosines divided by
`contrast_temperature` where the paper takes plain inner products; the retriever's pooling where it is not [CLS]. The mean of the contrast
runs over all spans of the step, that of the masked LM over all masked tokens.
"""

from __future__ import annotations

from typing import ClassVar

from simlm.objectives import Sequences
from simlm.objectives.condenser import Condenser


class CoCondenser(Condenser):
    """Condenser's terms on spans in place of passages; `simlm.objectives.contrast.Contrast` adds the third."""

    sequences: ClassVar[Sequences] = "neighbours"
    contrasts = True
