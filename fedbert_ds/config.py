"""The run file's keys, with types, defaults and what must fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fedbert_ds.user_path import expanded, user_path


def _text(value: Any) -> Any:
    """A whole number that stands where a text does: a folder called 2024. It reads as it is
    written, see `run_file._Yaml`.
    """
    return str(value) if type(value) is int else value


def _listed(value: Any) -> Any:
    """One text, as a list of it."""
    return (value,) if isinstance(value, str) or type(value) is int else value


Positive = Annotated[int, Field(gt=0)]
UserPath = Annotated[Path, BeforeValidator(_text), AfterValidator(lambda path: user_path(str(path)))]
Text = Annotated[str, BeforeValidator(_text)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_listed)]
"""Several texts; one of them may stand without the brackets of a list."""
Name = Annotated[Text, AfterValidator(expanded)]
"""A path, or a name of the hub."""
Names = Annotated[tuple[Name, ...], BeforeValidator(_listed)]
Host = Annotated[Text, AfterValidator(lambda host: host.strip("[]"))]
"""A name or an address. IPv6 may stand in brackets."""
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Codec = Literal["fp32", "bf16", "fp8_e4m3", "fp8_e5m2", "int8", "int8_group", "int4_hadamard"]
UpdateCodec = Literal["fp32", "bf16", "fp8_e4m3", "fp8_e5m2", "int8", "int8_group", "int4_hadamard", "int2_hadamard"]
"""Two bits are for changes of weights alone: what rounding takes is added to the next change."""
Kernels = Literal["auto", "triton", "torch"]


TaskName = Literal["masked_lm", "sequence_classification", "sequence_regression", "token_classification"]
TASK_NAMES: tuple[str, ...] = get_args(TaskName)


class Section(BaseModel):
    """Base of every section: no unknown keys, immutable. The string under a field documents it."""

    # Resolved run files pass through JSON, which has no infinity.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class RunSection(Section):
    """Where a run writes, how long it lasts, and its seed."""

    directory: UserPath = Path("runs/default")
    """Folder that the run writes: config.yaml, metrics.jsonl, evaluations.jsonl, report.html,
    loss.png, checkpoints/, hf/, hf-best/, clients/."""
    windows: Positive = 600
    """Number of windows; one window is one optimizer step of the body."""
    seed: int = 1
    """Seeds initial weights, shards, masking, sequence order and dropout."""
    save_every: Positive = 200
    """Windows between checkpoints. The last window is always saved."""
    evaluate_every: Positive | None = None
    """Windows between evaluations: every client computes the loss of the text that it keeps out of
    training (`data.client_held_out`). null: none."""
    evaluate_tokens: Positive = 65536
    """Most tokens of a client in an evaluation, spread evenly over its held-out text."""
    early_stopping_patience: Positive | None = None
    """The run is complete after so many evaluations in a row without a lower loss. null: it trains
    all windows."""
    keep_best: bool = False
    """Write the model of the lowest held-out loss so far to `hf-best/`, besides the last one in
    `hf/`."""
    trackers: Texts = ()
    """Experiment trackers that metrics and evaluations go to besides: `tensorboard` (files in
    trackers/), `wandb`, `mlflow` and others that accelerate knows and that are installed."""
    trace: bool = False
    """Write a timeline of every rank, `trace-RANK.json`, for https://ui.perfetto.dev."""


class ModelSection(Section):
    """The network: a checkpoint to continue from, or a shape to start from scratch."""

    checkpoint: Name | None = None
    """Hub name or folder of a Hugging Face masked LM: BERT, RoBERTa (also CamemBERT, XLM-RoBERTa),
    ELECTRA, DistilBERT or ModernBERT. null starts from scratch."""
    resize: bool = False
    """Give a checkpoint with fewer words than the tokenizer a row for each new one, the mean of the
    rows that it has. The merged model has them, too."""
    architecture: Literal["bert", "roberta", "electra", "distilbert", "modernbert"] = "bert"
    """Architecture when starting from scratch; a checkpoint brings its own."""
    num_hidden_layers: Positive = 2
    """Transformer layers of client and server together."""
    hidden_size: Positive = 128
    """Width H of the transformer layers."""
    embedding_size: Positive | None = None
    """Width E of the embeddings (ELECTRA only). null means hidden_size."""
    num_attention_heads: Positive = 2
    """Attention heads; must divide hidden_size."""
    intermediate_size: Positive | None = None
    """Width of the feed-forward layer. null means 4 x hidden_size, with ModernBERT's gate 1.5 x."""
    max_position_embeddings: Positive = 128
    """Longest sequence that the model has positions for, in tokens."""
    local_attention: Annotated[int, Field(ge=2)] = 128
    """Tokens that a token sees in layers with sliding windows, half on either side (ModernBERT)."""
    global_attention_every: Positive = 3
    """The first of so many layers sees whole sequences, the others have windows (ModernBERT)."""
    initializer_range: Annotated[float, Field(gt=0.0)] = 0.02
    """Standard deviation of initial weights, from scratch. BERT's 0.02 is for width 768; narrow
    models learn sooner with 0.02 x sqrt(768 / hidden_size)."""
    dropout: Probability = 0.1
    """Dropout of hidden states, from scratch or from a checkpoint. ModernBERT trains with 0.0."""
    attention_dropout: Probability | None = None
    """Dropout of attention probabilities. null means `dropout`. Attention is faster with 0.0, which
    ModernBERT trains with."""

    @model_validator(mode="after")
    def _shape(self) -> ModelSection:
        if self.checkpoint is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}; "
                "choose a divisor"
            )
        if self.resize and self.checkpoint is None:
            raise ValueError("resize is for a checkpoint; name one in model.checkpoint or remove it")
        if self.embedding_size is not None and self.architecture != "electra":
            raise ValueError("embedding_size is for architecture: electra; remove it or change the architecture")
        for key in ("local_attention", "global_attention_every"):
            if self.architecture != "modernbert" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for architecture: modernbert; remove it or change the architecture")
        return self


class LayersCut(Section):
    """The cut that leaves the first `layers` encoder layers with the client."""

    layers: Positive
    """Encoder layers that the client holds besides the embeddings."""


Cut = Literal["embeddings", "rows", "whole"] | LayersCut


class TaskSection(Section):
    """What is learned: masked words, or the owners' own labels (federated fine-tuning)."""

    name: TaskName = "masked_lm"
    """`masked_lm` pre-trains. The others fine-tune `model.checkpoint`: a label for each text or
    pair of texts, a score for each, or a label for each word (named entities)."""
    labels: Texts = ()
    """The labels' words, in the order of the classifier's outputs."""
    text: Texts = ()
    """Columns of `data.source` with the text, or with the two texts of a pair; of token
    classification the column of the words. Empty: `text`, of token classification `tokens`."""
    label: Text | None = None
    """Column with the label. null: `label`, of token classification `tags`."""

    @property
    def is_labelled(self) -> bool:
        """Clients bring labels of their own."""
        return self.name != "masked_lm"

    @model_validator(mode="after")
    def _fits(self) -> TaskSection:
        has_labels = self.name in ("sequence_classification", "token_classification")
        if has_labels and len(self.labels) < 2:
            raise ValueError(f"{self.name} needs labels, two at least; set labels: [negative, positive], say")
        if not has_labels and self.labels:
            raise ValueError(f"{self.name} has no labels; remove task.labels or change task.name")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels holds one twice; name each once")
        if len(self.text) > (2 if self.name.startswith("sequence") else 1):
            raise ValueError(f"{self.name} does not read {len(self.text)} columns; name fewer in task.text")
        if not self.is_labelled and (self.text or self.label):
            raise ValueError("masked_lm reads plain text; remove task.text and task.label or change task.name")
        return self


class TokenizerSection(Section):
    """The vocabulary: named, or trained by the server on text that it can read (local runs)."""

    path: Name | None = None
    """Hub name or folder of a tokenizer. null trains WordPiece on data.source."""
    vocab_size: Positive = 4000
    """Word pieces of a trained tokenizer."""
    kind: Literal["wordpiece", "byte_bpe"] = "wordpiece"
    """Of a trained tokenizer: BERT's, or byte-level BPE (RoBERTa's), which reads every script and
    text without spaces, such as Thai or proteins. No character becomes [UNK] there."""
    lowercase: bool | None = None
    """Whether a trained tokenizer takes capitals for small letters. null: as its kind does, so
    WordPiece does and byte-level BPE does not."""
    strip_accents: bool | None = None
    """Whether a trained WordPiece tokenizer leaves accents out; that changes words in Hindi,
    German or Vietnamese. null: where it takes capitals for small letters."""


class SequenceSection(Section):
    """How text becomes masked sequences, the same at every client."""

    sequence_length: Annotated[int, Field(ge=8)] = 128
    """Longest sequence in tokens, with [CLS] and [SEP]. Sequences are not padded."""
    mask_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of tokens to predict (80 % [MASK], 10 % random, 10 % unchanged)."""
    whole_word: bool = False
    """Mask whole words instead of single word pieces."""


class DataSection(SequenceSection):
    """Text, its shards for local clients, and how it becomes masked sequences."""

    source: Names = Field(default=("python-docs",), min_length=1)
    """`python-docs` (the documentation that comes with Python), .txt/.jsonl/.parquet/.tokens files
    or folders, or hub names `hub:NAME[:CONFIG][:SPLIT]`."""
    text_column: Text | None = None
    """Column or key of tables that holds the text. null: `text` in any case, or the only one."""
    encoding: str | None = None
    """Of text files without a byte order mark: cp1252, say. null: UTF-8, or what a file looks like,
    which is told."""
    cache: Name | None = None
    """Folder where local clients keep their text as tokens, each in a part of its own, so that they
    need not tokenize again. null: in the run's folder. `off`: in memory."""
    streaming: bool = False
    """Stream hub data sets instead of downloading them whole."""
    max_articles: Positive | None = None
    """Read at most this many articles, with `shards: source` of each source. Needed to stream
    unbounded sets."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of articles that no client gets; they give the final held-out loss."""
    client_held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of its own articles that each client keeps out of training, whether the run evaluates
    or not. A client may set another: `fedbert-ds client --held-out`."""
    shards: Literal["equal", "size", "topic", "source"] = "size"
    """Shards of local clients: equal article counts, Dirichlet-skewed sizes, Dirichlet-skewed
    topics, or each client the articles of one source of `source`, in their order."""
    alpha: Annotated[float, Field(gt=0.0)] = 2.0
    """Dirichlet concentration of `size` and `topic` shards. Smaller is more unequal."""


class WindowSection(Section):
    """One optimizer step of the body: its tokens, their packing, the order of micro-batches."""

    tokens: Positive = 8192
    """Tokens of one window, all clients together."""
    tokens_per_micro_batch: Positive = 2048
    """Most tokens of a micro-batch, which packs sequences of any clients."""
    micro_batches_in_flight: Positive | Literal["auto"] = "auto"
    """Most micro-batches of a rank between forward and backward. `auto` takes enough to hide the
    measured answer times of clients, as far as memory reaches."""
    clients_per_micro_batch: Positive = 1
    """1 keeps a client's sequences together and sends the fewest bytes. More lets that many clients
    work on a micro-batch side by side, for slow clients and few micro-batches in flight."""
    share: Literal["data", "equal"] = "data"
    """A client's part of `tokens`: in proportion to its shard, or equal. Where only m of K clients
    take part at a time, each brings K/m times that."""
    largest_share: Annotated[float, Field(ge=1.0)] = 4.0
    """With `share: data`, a client's text counts for at most so many times the median client's,
    however much it says that it has."""
    order: Literal["arrival", "fixed"] = "arrival"
    """`arrival` runs whichever micro-batch is complete first. `fixed` follows the plan alone and is
    bit-identical between runs."""


class OptimizerSection(Section):
    """Optimizer and learning-rate schedule, the same for the body and the client halves."""

    name: Literal["adamw", "lamb", "sgd", "muon"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), LAMB (You et al. 2020), plain SGD, or Muon (Jordan et al.
    2024) for the matrices of encoder layers and AdamW for the rest."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay of matrices. Biases and LayerNorm weights are never decayed."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Decay rates of the moment estimates."""
    momentum: Probability = 0.95
    """Share of its momentum that Muon keeps."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the denominator of the update. Where clients step their own word tables a larger one
    may serve tasks better (docs/whole.md, Adam and the word table)."""
    gradient_clipping: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest gradient norm; 0 turns clipping off.

    In `synchronous` mode without staleness it is the norm of the whole gradient, body and client
    model together, as in centralized training; otherwise body and client model are clipped apart.
    """
    schedule: Literal["linear", "polynomial", "constant"] = "linear"
    """Decay after warm-up, to zero one window after the last."""
    warmup_windows: Annotated[int, Field(ge=0)] = 0
    """Windows in which the learning rate rises linearly to `lr`."""
    power: Annotated[float, Field(gt=0.0)] = 2.0
    """Exponent of the polynomial schedule."""

    def learning_rate(self, window: int, num_windows: int) -> float:
        """Learning rate of window `window` (0-based) of `num_windows`."""
        if window < self.warmup_windows:
            return self.lr * (window + 1) / self.warmup_windows
        if self.schedule == "constant":
            return self.lr
        remaining = (num_windows - window) / max(1, num_windows - self.warmup_windows)
        return self.lr * max(0.0, remaining) ** (self.power if self.schedule == "polynomial" else 1.0)


def _checkpointing(value: Any) -> Any:
    # Older run files have true and false.
    return {True: "layers", False: "none"}[value] if isinstance(value, bool) else value


def _compile(value: Any) -> Any:
    # As for `cut`: one sentence instead of an error for each alternative.
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError("no such choice; set auto, true or false")


class BodySection(Section):
    """The body under DeepSpeed."""

    deepspeed: UserPath | None = None
    """DeepSpeed JSON file, relative to the run file. null: none, as `zero_stage` says enough."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """The ZeRO stage, whatever the DeepSpeed file says: 0 keeps the body whole on every rank, 1 and
    2 divide moments and master weights, 3 weights, too. The sum of a window's gradients is whole on
    every rank: 4 bytes a parameter. null: the file's, or 0."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision of the body. Master weights and sums of gradients are fp32 either way."""
    activation_checkpointing: Annotated[
        Literal["auto", "none", "elementwise", "attention", "int8", "layers"], BeforeValidator(_checkpointing)
    ] = "auto"
    """What backward computes again, so that a micro-batch in flight takes less memory. Results are
    the same to the bit, but with `int8`. `elementwise`: LayerNorm and GELU, no matrix product.
    `attention`: these and attention, for 3 % more computation at 512 tokens of BERT-base. `int8`:
    as `elementwise`, and what GELU takes is kept in 8 bits, which rounds gradients. `layers`: all
    but each layer's input, for a third more. `auto`: `elementwise` on a GPU, `none` on a CPU, with
    `compile: true` and with `fp8`."""
    compile: Annotated[Literal["auto"] | bool, BeforeValidator(_compile)] = "auto"
    """Run encoder layers under torch.compile, for any number of tokens; the compiler then chooses
    what backward computes again. `auto` measures it once for a card, with
    `activation_checkpointing: auto` or none; it is false on a CPU, at ZeRO stage 3 and for
    ModernBERT."""
    fp8: bool = False
    """Multiply matrices of encoder layers in fp8, by the package torchao; for `precision: bf16` and
    GPUs from Ada and Hopper on. On a CPU it is emulated, slowly."""

    @model_validator(mode="after")
    def _keys_together(self) -> BodySection:
        if self.fp8 and self.precision != "bf16":
            raise ValueError("fp8 is for precision: bf16; set that, or fp8: false")
        chosen = self.activation_checkpointing
        if self.compile is True and chosen in ("elementwise", "attention", "int8", "layers"):
            raise ValueError(
                f"compile: true chooses itself what is computed again; remove activation_checkpointing: {chosen}"
            )
        if self.fp8 and chosen in ("elementwise", "attention", "int8"):
            raise ValueError("fp8 keeps its own inputs; set activation_checkpointing: none or layers, or fp8: false")
        return self

    def recomputed(self, device_type: str) -> Literal["none", "elementwise", "attention", "int8", "layers"]:
        """What backward computes again on such a device."""
        what = self.activation_checkpointing
        if what == "auto":
            what = "none" if device_type == "cpu" or self.compile is True or self.fp8 else "elementwise"
        return what

    def may_compile(self, recomputed: str) -> bool:
        """Whether a compiler may choose in place of this what backward computes again."""
        return recomputed == "none" or self.activation_checkpointing == "auto"


def _participants(value: Any) -> Any:
    # As for `cut`: one sentence instead of an error for each alternative.
    if value == "all" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError("no such choice; set all or a number of clients, at least 1")


class FederationSection(Section):
    """How client halves are kept in step."""

    mode: Literal["synchronous", "parallel", "sequential"] = "synchronous"
    """`synchronous` sums the gradients of client halves every window (equals centralized training).
    `parallel` averages their weights (FedAvg); `cut: whole` needs it. `sequential` lets one client
    at a time train and hands its weights to the next (FedBERT's "share")."""
    average_every: Positive = 1
    """Windows between averages in `parallel` mode: a round. Windows of a client's turn in
    `sequential` mode; there it must divide `run.windows`."""
    participants: Annotated[Literal["all"] | int, BeforeValidator(_participants)] = "all"
    """How many of the clients take part in a window (`synchronous`) or a round (`parallel`), drawn
    anew for each from the run's seed. Those who do bring more, so that an average window still
    holds `window.tokens`."""
    average_scope: Literal["embeddings", "head", "embeddings+head"] = "embeddings+head"
    """Parts averaged in `parallel` mode. The rest stays personal to each client."""
    personal_parts: Literal["kept", "averaged"] = "kept"
    """What becomes of parts outside `average_scope` when a model is written. `kept`: they never
    leave their clients; the model has these parts as the run began. `averaged`: clients hand them
    over, and their mean by masked tokens is in the model."""
    staleness: Annotated[int, Field(ge=0, le=8)] = 0
    """Windows whose exchange of client updates a client need not wait for before it begins the
    next; 0 is exact, more hides exchanges over slow links."""
    server_optimizer: Literal["none", "momentum", "adam", "yogi", "nesterov"] = "none"
    """What an average in `parallel` mode moves the common weights by: `none` to the mean (FedAvg),
    the others by a step along the mean change: FedAvgM (Hsu et al. 2019), FedAdam, FedYogi (Reddi
    et al. 2021), or the outer optimizer of DiLoCo (Douillard et al. 2023)."""
    server_lr: Annotated[float, Field(gt=0.0)] | None = None
    """Learning rate of the server optimizer. adam and yogi move a weight by about so much at most
    in a round, so it should be near the clients' `optimizer.lr` times `average_every`. null means
    1.0 for momentum, 0.7 for nesterov, and `server_tau` for adam and yogi, which then follow small
    changes as they are."""
    server_momentum: Probability = 0.9
    """Share of the last round's momentum that momentum and nesterov keep."""
    server_betas: tuple[Probability, Probability] = (0.9, 0.99)
    """Decay rates of the moment estimates of adam and yogi."""
    server_tau: Annotated[float, Field(gt=0.0)] = 1e-3
    """Added to the denominator of adam and yogi: changes much smaller than this move the weights in
    proportion.
    """
    proximal: Annotated[float, Field(ge=0.0)] = 0.0
    """FedProx (Li et al. 2020) in `parallel` mode: mu of the term mu/2 ||w - w_common||^2 in each
    client's loss, over the averaged weights."""
    bound: Annotated[float, Field(ge=2.0)] | None = 10.0
    """What a client sends counts for at most so many times what is typical: the median client's
    gradient of a token, activation, or update. Honest clients stay below, and then nothing changes,
    to the bit; what is above is scaled down, counted and told. null: no bound."""
    combine: Literal["mean", "median", "trimmed_mean", "krum", "norm_clipping"] = "mean"
    """How client updates become one. `mean` (or, in `synchronous` mode, their sum) is exact. The
    others hold out against liars among the clients, and each costs something where all are honest:
    in `synchronous` mode the result no longer equals centralized training. Every client then counts
    alike, but for `norm_clipping`. `median` and `trimmed_mean` (Yin et al. 2018) go weight by
    weight, `krum` averages the updates that lie closest together (Multi-Krum, Blanchard et al.
    2017), `norm_clipping` scales each down to the typical norm (Sun et al. 2019)."""
    assumed_liars: Positive = 1
    """Clients that may lie, f. `trimmed_mean` leaves the f largest and the f smallest values of
    each weight out and needs more than 2 f clients; `krum` needs more than 2 f + 2."""
    clipping_radius: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest norm of an update with `norm_clipping`, as a multiple of the median client's."""

    @model_validator(mode="after")
    def _keys_together(self) -> FederationSection:
        for key, (other, values) in _ONLY_WITH.items():
            if getattr(self, key) != type(self).model_fields[key].default and getattr(self, other) not in values:
                choices = f"{', '.join(values[:-1])} or {values[-1]}" if len(values) > 1 else values[0]
                raise ValueError(f"{key} is for {other}: {choices}; remove it or change {other}")
        changes_hands = self.mode in TURNS or (self.mode in ROUNDS and self.participants != "all")
        if self.staleness and changes_hands:
            raise ValueError(
                f"staleness {self.staleness} would let a client begin its turn or round without the weights of the "
                "one before; set it to 0"
            )
        return self

    @property
    def fewest_clients(self) -> int:
        """Clients of a window that `combine` needs for so many `assumed_liars`."""
        return {"trimmed_mean": 2 * self.assumed_liars + 1, "krum": 2 * self.assumed_liars + 3}.get(self.combine, 1)

    @property
    def ends_in_turns(self) -> bool:
        """A run must end with a client's turn: what it learned in its turn comes to light then."""
        return self.mode in TURNS

    @property
    def server_learning_rate(self) -> float:
        """`server_lr`, or the server optimizer's own default."""
        if self.server_lr is not None:
            return self.server_lr
        return {"momentum": 1.0, "nesterov": 0.7}.get(self.server_optimizer, self.server_tau)


TURNS = frozenset({"sequential"})
"""Modes in which one client at a time has the client model."""
ROUNDS = frozenset({"parallel"})
"""Modes in which clients begin a round with weights that others made."""
_AVERAGING = "parallel"
"""The mode in which clients send weights or their change."""

_ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "combine": ("mode", ("synchronous", "parallel")),
    "assumed_liars": ("combine", ("trimmed_mean", "krum")),
    "clipping_radius": ("combine", ("norm_clipping",)),
    "participants": ("mode", ("synchronous", "parallel")),
    "server_optimizer": ("mode", ("parallel",)),
    "proximal": ("mode", ("parallel",)),
    "personal_parts": ("average_scope", ("embeddings", "head")),
    "server_lr": ("server_optimizer", ("momentum", "adam", "yogi", "nesterov")),
    "server_momentum": ("server_optimizer", ("momentum", "nesterov")),
    "server_betas": ("server_optimizer", ("adam", "yogi")),
    "server_tau": ("server_optimizer", ("adam", "yogi")),
}
"""Keys of `federation` that need one of these values of another key."""


class ClientsSection(Section):
    """Who takes part."""

    expected: Positive = 4
    """Clients that must join before the first window."""
    minimum: Positive | None = None
    """No window begins with fewer clients. null means `expected`."""
    maximum: Positive | None = None
    """Most clients at a time; those beyond `expected` may join later. null means `expected`."""
    on_loss: Literal["continue", "wait"] = "continue"
    """What happens when a client is lost. `continue`: the window goes on without its share, which
    the metrics count as lost. `wait`: the window is undone and trained again once the client is
    back; a run that lost clients ends as if it had not."""
    local: Annotated[int, Field(ge=0)] = 4
    """Client processes that the launcher starts on this machine."""
    allowed: Texts | None = None
    """Names of the clients that may join besides local ones: with TLS, names in certificates. null:
    whoever has a certificate of the authority."""
    local_device: Literal["cpu", "cuda"] = "cpu"
    """Where those compute. `cuda` deals them to all GPUs of this machine, on which the ranks
    compute, too."""
    join_timeout: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds to wait at the start for `expected` clients to join, then for their streams: who has
    joined and not come by then counts as lost, and somebody else may have its place; and in a run
    for clients that it cannot go on without."""
    silence_timeout: Annotated[float, Field(gt=0.0)] = 300.0
    """Seconds that a client may owe an answer. After that it is gone."""
    reconnect_timeout: Annotated[float, Field(gt=0.0)] = 60.0
    """Seconds for a client that lost its connection to come back and go on where it was. After that
    it is gone."""

    @model_validator(mode="after")
    def _counts(self) -> ClientsSection:
        if self.minimum is not None and self.minimum > self.expected:
            raise ValueError(f"minimum {self.minimum} is above expected {self.expected}; lower it")
        if self.maximum is not None and self.maximum < self.expected:
            raise ValueError(f"maximum {self.maximum} is below expected {self.expected}; raise it")
        if self.local > self.expected:
            raise ValueError(f"local {self.local} is above expected {self.expected}; raise expected")
        if self.allowed is not None and self.local + len(set(self.allowed)) < self.expected:
            raise ValueError(
                f"allowed names {len(set(self.allowed))} clients, and {self.expected - self.local} are expected from "
                "elsewhere; add names or lower expected"
            )
        return self

    @property
    def most(self) -> int:
        """Most clients at a time."""
        return self.maximum if self.maximum is not None else self.expected

    @property
    def required(self) -> int:
        """Fewest clients with which the run goes on."""
        return self.minimum if self.minimum is not None else self.expected


class TlsSection(Section):
    """PEM files of mutual TLS: all three or none."""

    ca: UserPath
    """Certificate of the authority that signed both sides."""
    certificate: UserPath
    """This server's certificate chain."""
    key: UserPath
    """This server's private key."""
    revoked: UserPath | None = None
    """List of certificates that no longer count: `revoked.txt` of `fedbert-ds certs revoke`. It is
    read again when it changes."""


class ServerSection(Section):
    """Where clients find the server."""

    host: Host = "127.0.0.1"
    """Address to listen on. 0.0.0.0 or :: for remote clients."""
    port: Annotated[int, Field(ge=0, le=65535)] = 29600
    """The coordinator's port. Rank r listens on port + r. 0 picks free ports."""
    advertise: Host | None = None
    """Host name under which clients reach the ranks. null uses `host`, or each node's name on
    several nodes."""
    tls: TlsSection | None = None
    """Mutual TLS (`fedbert-ds certs` makes the files). null is plain text, on loopback alone."""
    plaintext: bool = False
    """Listen beyond loopback without `tls`: whoever is on the way reads activations, and may take
    anybody's place. For networks that nobody else is in."""
    network: Literal["auto", "thread", "process"] = "auto"
    """Where a rank's network runs. `thread`: in the body's process. `process`: in one of its own,
    which costs more CPU time and does not make the body wait. `auto`: a process where there are
    GPUs, or TLS: then failed handshakes are told and counted there."""
    shared_memory: bool = True
    """Clients on this machine pass large messages through shared memory instead of sockets."""


class AggregatorSection(Section):
    """An aggregator of another party, which owns the client model: `fedbert-ds aggregator`.

    Both parties have this section. Clients use the keys and certificates of their command lines.
    """

    address: str
    """HOST:PORT at which ranks and clients reach the aggregator."""
    secret: UserPath
    """File with a secret that the two parties share and no client knows."""
    host: Host = "127.0.0.1"
    """For the aggregator: address to listen on. 0.0.0.0 or :: for remote ranks and clients. The
    port is that of `address`."""
    directory: UserPath | None = None
    """For the aggregator: folder of its checkpoints and of the final client model. null is
    `run.directory` with `-aggregator` added."""
    seed: int | None = None
    """For the aggregator: seed of the first client model. null means `run.seed`, which the server
    knows, so it knows the first client model, too."""
    tls: TlsSection | None = None
    """For the aggregator: its files of mutual TLS. Ranks that dial it show `server.tls`."""
    plaintext: bool = False
    """Reach the aggregator beyond loopback without TLS, as `server.plaintext`."""

    @model_validator(mode="after")
    def _address(self) -> AggregatorSection:
        host, _, port = self.address.rpartition(":")
        if not host or "://" in host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"address {self.address} is not HOST:PORT; write both")
        if ":" in host and not (host.startswith("[") and host.endswith("]")):
            raise ValueError(f"address {self.address}: is IPv6 without brackets; write [::1]:29700, say")
        return self

    @property
    def port(self) -> int:
        """The port of `address`."""
        return int(self.address.rpartition(":")[2])


class WireSection(Section):
    """Codecs of activations, gradients and client updates.

    - fp32 is exact.
    - int8 and fp8 keep one scale a row.
    - int8_group and int4_hadamard keep one scale for every 64 columns.
    - int4_hadamard rotates each of these groups first, so that no single value sets the scale.
    - int2_hadamard does, too, and has four codes.
    """

    activations: Codec = "fp32"
    """Codec of activations, up."""
    hidden: Codec | None = None
    """Codec of hidden states, down. null means as activations."""
    gradients: Codec = "fp32"
    """Codec of gradients, up and down."""
    updates: UpdateCodec = "fp32"
    """Codec of the matrices in client updates, up and down. `synchronous` mode sends gradients.
    `parallel` mode sends weights under fp32, and else their change since the last average; with
    `cut: whole` always the change. int2_hadamard is for changes alone."""
    compression: Literal["zstd", "none"] = "zstd"
    """Lossless, of all of these. Saves a twelfth of int8, a seventh of int4 and a third of bf16;
    costs both ends about a second per GB."""

    @property
    def is_compressed(self) -> bool:
        """Whether coded tensors are compressed."""
        return self.compression != "none"

    @property
    def hidden_states(self) -> Codec:
        """Codec of hidden states, down."""
        return self.hidden or self.activations


def _cut(value: Any) -> Any:
    # Pydantic's error for the union would list all its alternatives; one sentence is kinder.
    if value in ("embeddings", "rows", "whole") or isinstance(value, LayersCut):
        return value
    if isinstance(value, dict) and set(value) == {"layers"}:
        return LayersCut(**value)
    raise ValueError("no such cut; set embeddings, rows, whole or {layers: K}")


class RunConfig(Section):
    """The whole run file."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    cut: Annotated[Cut, BeforeValidator(_cut)] = "embeddings"
    """What the client holds: `embeddings`, `rows` (the word table alone), `{layers: k}`, or
    `whole`: everything, so that there is no body."""
    task: TaskSection = TaskSection()
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection = DataSection()
    window: WindowSection = WindowSection()
    optimizer: OptimizerSection = OptimizerSection()
    body: BodySection = BodySection()
    kernels: Kernels = "auto"
    """Kernels of the body's attention and of the small operations between its matrix products:
    `triton` (ours, for CUDA), `torch`, or `auto`. `auto` is, on a GPU where Triton is installed,
    what is measured fastest on it, ours or others; `torch` elsewhere."""
    federation: FederationSection = FederationSection()
    clients: ClientsSection = ClientsSection()
    server: ServerSection = ServerSection()
    aggregator: AggregatorSection | None = None
    """null: the ranks are the aggregator."""
    wire: WireSection = WireSection()

    @model_validator(mode="after")
    def _across_sections(self) -> RunConfig:
        if self.data.sequence_length > self.window.tokens_per_micro_batch:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} does not fit window.tokens_per_micro_batch "
                f"{self.window.tokens_per_micro_batch}; raise the latter"
            )
        if self.data.shards == "source" and self.clients.local not in (0, len(self.data.source)):
            raise ValueError(
                f"data.shards: source gives each local client one source, and there are {self.clients.local} clients "
                f"for {len(self.data.source)} sources; set clients.local: {len(self.data.source)}"
            )
        self._evaluations()
        participants, expected = self.federation.participants, self.clients.expected
        if participants != "all" and participants > expected:
            raise ValueError(
                f"federation.participants {participants} is above clients.expected {expected}; lower it or say all"
            )
        together = expected if participants == "all" else participants
        if together < (fewest := self.federation.fewest_clients):
            raise ValueError(
                f"federation.combine {self.federation.combine} with assumed_liars {self.federation.assumed_liars} "
                f"needs {fewest} clients at a time, and there are {together}; lower federation.assumed_liars"
            )
        if self.federation.ends_in_turns and self.run.windows % self.federation.average_every:
            raise ValueError(
                f"run.windows {self.run.windows} ends in the middle of a turn of federation.average_every "
                f"{self.federation.average_every} windows; make it a multiple"
            )
        if self.model.checkpoint is None:
            if self.data.sequence_length > self.model.max_position_embeddings:
                raise ValueError(
                    f"data.sequence_length {self.data.sequence_length} is longer than the position table, "
                    f"model.max_position_embeddings {self.model.max_position_embeddings}; lower the former"
                )
            if isinstance(self.cut, LayersCut) and self.cut.layers >= self.model.num_hidden_layers:
                raise ValueError(
                    f"cut.layers {self.cut.layers} leaves the server no layer of model.num_hidden_layers "
                    f"{self.model.num_hidden_layers}; lower it"
                )
        if self.clients.on_loss == "wait" and self.federation.staleness:
            raise ValueError(
                "clients.on_loss: wait undoes a window whose client is lost, and with federation.staleness others may "
                "have gone on by then; set one of them to its default"
            )
        if self.wire.updates == "int2_hadamard" and self.federation.mode != _AVERAGING:
            raise ValueError("wire.updates int2_hadamard is for federation.mode: parallel; choose another codec")
        if self.aggregator is not None and self.cut == "whole":
            raise ValueError(
                "cut: whole leaves the server nothing but the client model, which the section aggregator gives to "
                "another party; remove the section or change the cut"
            )
        if self.cut == "rows" and len(self.task.text) == 2:
            raise ValueError("cut: rows does not tell the server which of two texts a token is of; set cut: embeddings")
        if self.cut == "whole":
            self._without_a_body()
        return self

    def _evaluations(self) -> None:
        """ValueError for evaluations without text, or settings of them without evaluations."""
        run = self.run
        if run.evaluate_every is None:
            for key in ("early_stopping_patience", "keep_best"):
                if getattr(run, key):
                    raise ValueError(f"run.{key} needs evaluations; set run.evaluate_every")
        elif not self.data.client_held_out:
            raise ValueError(
                "run.evaluate_every needs text that clients keep out of training; set data.client_held_out, 0.05 say"
            )
        if run.keep_best and self.aggregator is not None:
            raise ValueError(
                "run.keep_best writes the whole model, and the client model is with the aggregator; remove "
                "run.keep_best or the section aggregator"
            )

    def _without_a_body(self) -> None:
        """ValueError for what `cut: whole` cannot do, and for settings of a body."""
        federation = self.federation
        if federation.mode != _AVERAGING:
            raise ValueError(
                "cut: whole has clients step alone and averages their changes; set federation.mode: parallel"
            )
        for key in ("staleness", "average_scope"):
            if getattr(federation, key) != type(federation).model_fields[key].default:
                raise ValueError(f"federation.{key} is for clients that share a body; remove it or change cut: whole")
        for key in ("zero_stage", "precision", "activation_checkpointing", "compile", "fp8"):
            if getattr(self.body, key) != type(self.body).model_fields[key].default:
                raise ValueError(f"body.{key}: cut: whole has no body; remove the key or change the cut")
        if self.kernels != "auto":
            raise ValueError("kernels: cut: whole has no body; remove the key or change the cut")
        if self.run.windows % federation.average_every:
            raise ValueError(
                f"run.windows {self.run.windows} is no multiple of federation.average_every "
                f"{federation.average_every}: the last windows would not reach the model; change either"
            )
