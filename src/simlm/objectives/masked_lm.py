"""Plain masked language modelling: what the generator is trained with, and the simplest objective to compare with.

Source: BERT (arXiv 1810.04805) with whole-word masks. Differs: every masked token becomes [MASK] (no 80/10/10), which is what the
generator is shown when it is sampled from (method.md section 1).
"""

from __future__ import annotations

from simlm.objectives import Objective


class MaskedLM(Objective):
    """Cross-entropy at the masked positions, hidden states of all others being dropped before the head; nothing passes through [CLS]."""

    bottleneck = False
