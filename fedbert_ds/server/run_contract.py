"""What a run's messages must hold to, from its run file and its client half."""

from __future__ import annotations

from fedbert_ds.config import RunConfig
from fedbert_ds.federation.strategy import Strategy, strategy_of_run
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.server.contract import Contract, Sizes, TensorContract
from fedbert_ds.server.first_sizes import first_sizes


def build_contract(config: RunConfig, half: ClientHalf) -> Contract:
    """The contract of this run's messages, from the run file and the client half."""
    strategy = strategy_of_run(config)
    parameters = {name: tuple(parameter.shape) for name, parameter in half.named_parameters()}
    if config.aggregator is not None:
        parameters = {}  # none of them comes here
    most = max(config.window.tokens_per_micro_batch, config.data.sequence_length)
    return Contract(
        activations=TensorContract(config.wire.activations, half.widths.activations, most),
        gradients=TensorContract(config.wire.gradients, half.widths.hidden, most, is_gradient=True),
        longest_sequence=config.data.sequence_length,
        is_rows_cut=config.cut == "rows",
        exchanged={n: shape for n, shape in parameters.items() if strategy.takes_part(half.parameter_scope(n))},
        handed_over={n: shape for n, shape in parameters.items() if strategy.is_handed_over(half.parameter_scope(n))},
        update_codec=strategy.update_codec,
        num_counts=half.num_counts,
        mask_probability=1.0 if config.task.is_labelled else config.data.mask_probability,
        first_sizes=_first_sizes(config, half),
    )


def _first_sizes(config: RunConfig, half: ClientHalf) -> Sizes | None:
    if config.cut == "whole" or config.federation.bound is None:
        return None
    return first_sizes(half, config.wire.activations, config.data.sequence_length, config.run.seed)


def most_window_bytes(config: RunConfig, strategy: Strategy, contract: Contract) -> float:
    """Bytes of a window's tensors to one client, if all text were its own."""
    expected = config.clients.expected
    tokens = config.window.tokens * expected / strategy.num_participants(expected)
    return 4 * tokens * (contract.activations.width + contract.gradients.width)
