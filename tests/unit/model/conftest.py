"""Small models of the four architectures, and the cuts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from unit.model.samples import FROM_SCRATCH, PAD, VOCABULARY, small_section

from fedbert_ds.config import LayersCut
from fedbert_ds.model.checkpoint import build_model

CUTS = {"embeddings": "embeddings", "rows": "rows", "layers": LayersCut(layers=1)}


@pytest.fixture
def small_model() -> Callable[..., Any]:
    """Builds a three-layer model, 16 wide (ELECTRA's embeddings 8), by default without dropout."""

    def build(architecture: str, **changes: Any) -> Any:
        return build_model(small_section(architecture, **changes), VOCABULARY, PAD, seed=3)

    return build


@pytest.fixture(params=FROM_SCRATCH)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(CUTS))
def cut(request: pytest.FixtureRequest) -> Any:
    return CUTS[request.param]
