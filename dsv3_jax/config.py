"""The typed configuration of a run: frozen dataclasses, composed by the functions in `configs/`.

A run is a Python function that returns a whole `Config`. absl picks it (`--config=tiny`) and
`overrides.py` applies `--set group.key=value`. Every field states its unit or meaning; the value
published for V3 is given with its spec section where there is one.
"""

from dataclasses import dataclass, field

from dsv3_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Context extension of the rotary part (spec §2, §9). Off during 4K pre-training."""

    enabled: bool = False
    factor: float = 40.0  # s: the context grows by this factor
    original_length: int = 4096  # tokens of the context before extension
    beta_fast: float = 32.0  # rotations over the original length above which a pair is untouched
    beta_slow: float = 1.0  # rotations below which a pair is fully interpolated
    mscale: float = 1.0  # mu in m = 0.1 mu ln s + 1; m^2 multiplies the whole logit


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture (spec §1). Shape letters as in `shapes.md`."""

    vocab_size: int  # V, rows of the embedding table
    width: int  # D
    num_layers: int  # main-model blocks, MTP excluded
    num_dense_layers: int  # leading blocks with a dense FFN
    dense_ffn_width: int  # F of the dense blocks
    expert_ffn_width: int  # F of one routed expert
    num_heads: int  # N
    qk_nope_head_dim: int  # P
    qk_rope_head_dim: int  # R
    v_head_dim: int  # H
    q_latent_dim: int | None  # Q; None: queries straight from the hidden state (V2-Lite)
    kv_latent_dim: int  # L
    num_experts: int  # E, routed
    num_shared_experts: int  # stored as one FFN of this many expert widths
    experts_per_token: int  # K
    num_groups: int = 1  # G, groups of consecutive experts (a group is a node)
    num_groups_kept: int = 1  # groups a token may be routed to
    group_score: str = "top2_sum"  # 'top2_sum' (V3) or 'max' (V2)
    affinity: str = "sigmoid"  # 'sigmoid' (V3) or 'softmax' (V2)
    normalize_weights: bool = True  # divide by the sum over the selected experts
    routed_scaling_factor: float = 2.5
    mtp_depth: int = 1  # D of spec §4: sequential prediction modules
    mtp_hidden: str = "post_norm"  # MTP's input: after or before ('pre_norm') the final norm
    rope_theta: float = 10000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)
    norm_epsilon: float = 1e-6
    init_std: float = 0.006  # every learnable matrix ~ N(0, init_std^2) (spec §1)

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Expert load balance (spec §3)."""

    method: str = "loss_free"  # 'loss_free' (bias), 'auxiliary' (V2 losses, no bias) or 'none'
    bias_speed: float = 0.001  # gamma of the bias update, until 14.3/14.8 of the tokens
    sequence_weight: float = 1e-4  # alpha of the sequence-wise loss; 0 turns it off
    expert_weight: float = 0.003  # alpha_1, alpha_2, alpha_3 of V2, used by 'auxiliary' only
    device_weight: float = 0.05
    communication_weight: float = 0.02


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Mesh and layouts. The product of the axes is the number of devices used."""

    pipe: int = 1
    data: int = 1
    expert: int = 1
    layout: str = "zero1_ep"  # 'zero1_ep' (the paper's) or 'fsdp_ep'
    dispatch: str = "padded"  # 'padded', 'ragged' or 'hierarchical'
    devices_per_node: int = 8  # hierarchical: consecutive `expert` positions that share a node


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats. Master weights and weight gradients are always float32."""

    compute: str = "bfloat16"  # matmul operands: 'bfloat16', 'float32' or 'fp8' (spec §5)
    moments: str = "bfloat16"  # AdamW m and v (spec §5.4)
    remat: str = "paper"  # activations recomputed: 'none', 'paper' (spec §5.5) or 'full'
    # Departures from the FP8 recipe, for ablation (spec §5.2, §5.7).
    gradient_scales: str = (
        "tiles"  # activation gradients: a scale a 1x128 tile, or 'blocks': 128x128
    )
    scales: str = "fine"  # 'tensor': one scale for a whole operand
    promotion: bool = True  # false: emulates sums that stay in the tensor cores' 14 bits

    @property
    def activations(self) -> str:
        """Dtype of what flows between the products."""
        return "bfloat16" if self.compute == "fp8" else self.compute


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedules (spec §8). Schedules are indexed by tokens, warm-up by steps."""

    peak_lr: float = 2.2e-4
    warmup_steps: int = 2000
    total_tokens: float | None = None  # the schedules' 14.8T; None: num_steps * tokens_per_step
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8  # unpublished
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    mtp_weight: float = 0.3  # lambda of the first 10/14.8 of the tokens
    mtp_weight_late: float = 0.1  # lambda afterwards
    ema_decay: float = 0.0  # EMA of the weights in host memory; 0 turns it off (decay unpublished)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One corpus of a mixture."""

    kind: str = "python"  # 'python', 'text', 'jsonl', 'parquet', 'arrayrecord'
    path: str = ""  # file, folder or glob; python: '' (standard library) or 'packages' (all)
    weight: float = 1.0  # share of the mixture, relative to the others
    text_key: str = "text"  # jsonl, parquet: the field that holds the text


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpus, tokenizer and batch shape (spec §8)."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    tokenizer: str = "train"  # 'train': byte-level BPE on the corpus; or a tokenizer.json
    cache_dir: str = ""  # tokenised shards and the trained tokenizer; '': ~/.cache/dsv3_jax
    prepared: str = ""  # folder of tools/prepare_data to read instead of sources and tokenizer
    sequence_length: int = 4096  # tokens a sequence
    sequences_per_step: int = 15360  # global batch after the ramp
    sequences_per_step_start: int | None = None  # batch at token 0 (3072 in V3); None: no ramp
    batch_ramp_fraction: float = 0.469 / 14.8  # share of total_tokens over which the batch grows
    microbatch_sequences: int | None = None  # global sequences a micro-batch; None: all
    fim_rate: float = 0.1  # share of documents turned into prefix-suffix-middle
    punctuation_split_rate: float = 0.1  # share of punctuation+newline tokens split
    deduplicate: bool = True  # drop near-duplicate documents (MinHash)
    filter_quality: bool = True  # drop very short, repetitive or incompressible documents
    separate_documents: bool = False  # block-diagonal attention over packed documents (SFT only)
    max_documents: int | None = None  # read at most this many documents of each source
    validation_documents: int = 64  # held out for validation, at most a quarter of a source


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and keeping checkpoints under WORKDIR/checkpoints."""

    interval_steps: int = 1000
    keep: int = 3  # newest checkpoints kept
    restore: bool = True  # continue from the newest checkpoint that verifies
    initial_weights: str = ""  # folder or run whose weights a new run starts from; '': random ones


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, seeds and reports of a run."""

    name: str
    num_steps: int | None = None  # None: until total_tokens are consumed
    seed: int = 0
    log_interval: int = 10  # steps between console lines
    eval_interval: int = 100  # steps between evaluations; one is made at step 0 and at the end
    eval_batches: int = 4  # validation batches, of one micro-batch each
    num_samples: int = 3  # texts sampled at the end
    sample_tokens: int = 64  # tokens a sample


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig
    model: ModelConfig
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def microbatch_sequences(self) -> int:
        return self.data.microbatch_sequences or self.data.sequences_per_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step after the batch ramp."""
        return self.data.sequences_per_step * self.data.sequence_length

    @property
    def total_tokens(self) -> float:
        """Tokens that the schedules' 14.8T stands for (spec §8)."""
        if self.optim.total_tokens is not None:
            return self.optim.total_tokens
        if self.run.num_steps is None:
            raise UserError("optim.total_tokens and run.num_steps are both none; set one of them")
        return float(self.run.num_steps * self.tokens_per_step)
