"""How the shipped language model of bytes is trained: data and learning rates, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.models.needles import TEMPLATES


@dataclass(frozen=True)
class Phase:
    """A part of the training in which the data do not change.

    Attributes:
        steps: optimizer steps.
        lengths: tokens per sequence; each step draws one of these.
        tokens: tokens per step.
        rate: learning rates at the first and last step, as fractions of the recipe's; linear between them.
        copies, texts, pairs: shares of copied strings, plain text and repeated facts among the sequences; the others
            are facts in text, with questions.
        templates: phrasings of facts, of those in `needles.TEMPLATES`.
        facts, questions, pool: smallest and largest number of facts in a text, of questions for them, and of repeated
            facts; None lets it grow with the length.
        alike: how often all facts of a sequence are phrased alike, so that only names tell them apart.
        selection: weight of `selection_loss` of the last layer.
    """

    steps: int
    lengths: tuple[int, ...]
    tokens: int
    rate: tuple[float, float]
    copies: float
    texts: float
    pairs: float = 0.0
    templates: int = len(TEMPLATES)
    facts: tuple[int, int] | None = None
    questions: tuple[int, int] | None = None
    pool: tuple[int, int] | None = None
    alike: float = 0.0
    selection: float = 0.0

    def ranges(self, length: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Of facts, questions and pool for sequences of this length."""
        return (
            self.facts or (2, max(4, min(12, length // 96))),
            self.questions or (2, max(4, min(10, length // 96))),
            self.pool or (3, max(8, min(64, length // 24))),
        )


PHASES = (
    # Copying begins to show.
    Phase(600, (256,), 4096, (1.0, 1.0), 0.3, 0.2, 0.0, 2, (2, 4), (2, 4)),
    Phase(300, (256,), 4096, (0.3, 0.3), 0.2, 0.1, 0.0, 2, (2, 6), (2, 4)),
    # Repeated facts kindle the look-up.
    Phase(200, (256,), 4096, (0.3, 0.3), 0.1, 0.1, 0.4, 4, (2, 4), (2, 4), (3, 8)),
    Phase(250, (256, 512, 512, 1024), 8192, (0.3, 0.3), 0.1, 0.1, 0.3),
    # Now names have to be told apart, and texts grow.
    Phase(250, (512, 1024, 2048), 8192, (0.3, 0.3), 0.05, 0.1, 0.3, alike=0.6),
    Phase(150, (1024, 2048, 4096), 8192, (0.3, 0.15), 0.05, 0.1, 0.2, alike=0.6),
    Phase(300, (1024, 2048, 4096, 8192), 8192, (0.15, 0.01), 0.05, 0.15, 0.2, alike=0.6),
    # What attends densely learns to be found by means.
    Phase(200, (1024, 2048, 4096), 8192, (0.15, 0.01), 0.0, 0.15, 0.1, alike=0.5, selection=0.2),
)


@dataclass(frozen=True)
class Recipe:
    """All hyper-parameters.

    Muon (Jordan et al. 2024) for the matrices of the layers, AdamW (arXiv 1711.05101) for embedding and norms. The loss
    is the mean cross-entropy of text bytes plus that of the answers' bytes.
    """

    phases: tuple[Phase, ...] = PHASES
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    momentum: float = 0.95
    weight_decay: float = 0.01
    warmup: int = 50
    norm_weight: float = -0.6  # of the norms behind attention and MLP, which thus begin at 0.4
    matrix_gain: float = 0.6  # matrices begin at this over the root of their inputs
    boundary_steps: int = 200
    boundary_texts: int = 64
    boundary_length: int = 2048
    boundary_rate: float = 1e-3
    seed: int = 0
    threads: int = 1
