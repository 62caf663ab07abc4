"""Running verifiers so that none can hang or end the run."""

from lit_rlvr.verify.pool import Verdicts, Verifier

__all__ = ["Verdicts", "Verifier"]
