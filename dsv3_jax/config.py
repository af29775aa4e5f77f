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
    context: int = 1  # devices that share every sequence, for long ones (parallel/context.py)
    schedule: str = "dualpipe"  # of pipe > 1: 'dualpipe', 'dualpipev', 'zb1p' or '1f1b' (spec §6)
    max_deferred: int | None = None  # weight-gradient chunks a rank may queue; None: as scheduled
    layout: str = "zero1_ep"  # 'zero1_ep' (the paper's) or 'fsdp_ep'
    dispatch: str = "padded"  # 'padded', 'ragged' or 'hierarchical'
    # Room for the rows that experts receive, over what even routing sends; None: for any routing.
    # A step whose rows find no room changes nothing, and the run stops and says so.
    buffer_factor: float | None = None
    devices_per_node: int = 8  # hierarchical: consecutive `expert` positions that share a node

    @property
    def num_devices(self) -> int:
        return self.pipe * self.data * self.context * self.expert


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

    schedule: str = "published"  # V3's pre-training; 'cosine': peak_lr to final_lr, rest constant
    peak_lr: float = 2.2e-4
    final_lr: float = 1e-6  # of schedule 'cosine' (spec §10.1)
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
    # The ramp's steps; every batch size compiles the training step. None: the smallest allowed.
    batch_ramp_sequences: int | None = None
    # Global sequences a micro-batch; None: all, or one a device where a pipeline wants many.
    microbatch_sequences: int | None = None
    fim_rate: float = 0.1  # share of documents turned into prefix-suffix-middle
    punctuation_split_rate: float = 0.1  # share of punctuation+newline tokens split
    deduplicate: bool = True  # drop near-duplicate documents (MinHash)
    filter_quality: bool = True  # drop very short, repetitive or incompressible documents
    separate_documents: bool = False  # block-diagonal attention over packed documents (SFT only)
    on_bad_record: str = "stop"  # 'stop', or 'skip': left out and counted when texts are prepared
    max_bad_fraction: float = 1e-4  # of the records that may be skipped; more stop the run
    max_documents: int | None = None  # read at most this many documents of each source
    validation_documents: int = 64  # held out for validation, at most a quarter of a source


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """Long-context extension (spec §9): phases with as many tokens a step as pre-training had."""

    first_length: int = 32768
    second_length: int = 131072  # 0: no second phase
    steps: int = 1000  # of each phase
    learning_rate: float = 7.3e-6


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning (spec §10.1)."""

    conversations: str = ""  # JSONL file, folder of them or glob; see posttrain/conversations.py
    epochs: int = 2
    max_bad_fraction: float = 0.01  # of the records, left out and counted; more stop the run


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """Group-relative policy optimisation (spec §10.3); V3 publishes no value."""

    problems: str = "arithmetic"  # the built-in task; or JSONL, see posttrain/problems.py
    reward: str = "exact"  # 'exact', 'boxed', 'boxed_and_format' or 'code'
    group_size: int = 16  # G answers to a problem (R1-Zero: 16, Math: 64)
    updates_per_rollout: int = 1  # steps of data.sequences_per_step answers each (R1-Zero: 16)
    max_answer_tokens: int = 1024
    temperature: float = 1.0  # of sampling, and of the policy in the loss
    form: str = "token"  # 'token': mean over an answer's tokens; 'sequence': as V3 prints it
    clip_epsilon: float = 0.2  # (R1 stage 1: 10)
    kl_weight: float = 0.001  # beta (R1-Zero: 0.001, Math: 0.04)
    reference_steps: int = 400  # steps between replacements of the reference policy (R1-Zero)
    sample_std: bool = False  # divide a group's squared deviations by G - 1 and not by G
    routing_replay: bool = False  # updates use the experts that the rollout's policy chose
    reward_seconds: float = 30.0  # for one reward
    max_failed_fraction: float = 0.1  # of a rollout's rewards; more stop the run


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Logit distillation; V3 publishes none (it distils texts, spec §10.4)."""

    teacher: str = ""  # run or folder with the student's tokenizer
    weight: float = 0.5  # of the teacher's distribution; the rest is cross-entropy with the text
    temperature: float = 1.0  # of both distributions
    top_k: int = 0  # most probable tokens that are compared, the others as one; 0: each


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and keeping checkpoints under WORKDIR/checkpoints."""

    interval_steps: int = 1000  # between the starts of two saves, which run beside the steps
    # Most steps a kill may cost: training waits for a save before it gets further beyond the last
    # complete one. None: two intervals, and no wait unless a save takes a whole one.
    max_lost_steps: int | None = None
    keep: int = 3  # newest checkpoints kept
    on_save_error: str = "stop"  # after further tries: 'stop', or 'continue' without a checkpoint
    restore: bool = True  # continue from the newest checkpoint that verifies
    initial_weights: str = ""  # folder or run whose weights a new run starts from; '': random ones


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Steps that are skipped, computed twice, or waited for no longer."""

    window: int = 128  # accepted steps that tell a spike from noise
    sigmas: float = 6.0  # deviations over their mean that are a spike; 0: only NaN and Inf are
    recheck_interval: int = 0  # steps between two that are computed twice; 0: none
    hang_seconds: float = 60.0  # least time a step is given before the run ends; 0: for ever


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
    # False: layers are compiled one by one, for faster steps; compiles longer. A pipeline loops.
    scan_layers: bool = True


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
    guard: GuardConfig = field(default_factory=GuardConfig)
    extend: ExtendConfig = field(default_factory=ExtendConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    @property
    def microbatch_sequences(self) -> int:
        if self.data.microbatch_sequences is not None:
            return self.data.microbatch_sequences
        parallel = self.parallel
        if parallel.pipe > 1:
            return parallel.data * parallel.expert
        return self.data.sequences_per_step

    @property
    def batch_ramp_sequences(self) -> int:
        """Sequences that a batch may grow by: DualPipe takes micro-batches in pairs (spec §6.2)."""
        paired = self.parallel.pipe > 1 and self.parallel.schedule == "dualpipe"
        return self.data.batch_ramp_sequences or self.microbatch_sequences * (2 if paired else 1)

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
