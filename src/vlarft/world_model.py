"""World model: an autoregressive transformer over frame tokens and action bins (Sec. 3.2).

A sequence is the context frame, then frames and actions in turn; `TokenLayout` defines all ids and positions:

    ctx(c) | dyn(f0) a0 | dyn(f1) a1 | ... | dyn(fT)           c: the context frame, f0 itself or an earlier one

Training maximises the likelihood of the tokens of frames >= 1, Eq. (3). A rollout, Eq. (2) and (10), runs ctx through
the transformer once per start; the G action chunks of a start share that part of the KV cache. Beyond the paper, a
rollout may go on for any number of chunks: an imagination keeps its context, and the tokens of a chunk's last frame are
the dyn(f0) of the next.

Actions are raw environment actions everywhere in this file. Beyond the paper, a model may be driven by where they lead
(`pose_dims`): a small network predicts the robot's state after each, and its pose is what stands in the sequence.
`WorldModel.controls` makes what stands there, whose ranges and bins are part of the model.

Shapes: S starts, G group members per start, B rows (B = S * G in a rollout), T actions, L = T + 1 frames, A action dim,
P proprio dim, C controls (A, or pose and grippers), Nc context tokens, Nf tokens of a frame, N tokens, D width, V
future codes.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlarft.action_bins import ActionBins
from vlarft.data.episode import RobotState
from vlarft.nets.kv_cache import Cache, KVCache, StaticKVCache
from vlarft.nets.static_decoding import StaticDecoding
from vlarft.nets.transformer import Decoder, TransformerConfig
from vlarft.proprio_model import ProprioModel
from vlarft.run.checkpoint import load_model
from vlarft.run.hub_model import HubModel
from vlarft.run.memory import rows_at_once
from vlarft.token_layout import TokenLayout
from vlarft.token_sampling import Sampling
from vlarft.tokenizer import PRESETS as TOKENIZERS
from vlarft.tokenizer import Context, FrameTokenizer, TokenizerConfig


@dataclass(frozen=True)
class WorldModelConfig:
    """Sizes of the world model; the defaults are the paper's (127,101,696 parameters without the tokenizer).

    Args:
        tokenizer: sizes of the frozen tokenizer.
        transformer: sizes of the decoder.
        chunk: actions T of a segment.
        action_dim: action dimensions A.
        action_bins: bins per dimension; all dimensions share their ids.
        future_codes_only: normalise the loss over the future codes instead of the whole vocabulary, as rollouts do. Off
            in the paper; it makes the head of a small model cheap.
        slot_embedding: add to a token's embedding a learned vector for its place in the frame or action. The paper has
            rotary positions only, from which a short training is slow to learn what each place means.
        factored_tokens: add to each token's row, in the embedding and in the head, a learned linear function of what
            the token stands for: the digits of an FSQ code, the value of an action bin. What is learned for one token
            then carries over to similar ones. Off in the paper; made for short trainings.
        proprio_dim: dimensions P of the robot's state, which the model then predicts beside the frames; 0: it does not.
        pose_dims: what drives the frames, one token per dimension. 0, the paper: the action. Else this many leading
            dimensions of the proprio that follows it, the hand's pose, and its gripper commands. Actions have to be
            added up to know where the hand is; a pose says it (Ctrl-World).
        gripper_dims: with `pose_dims`, the gripper commands' dimensions in raw actions.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    chunk: int = 8
    action_dim: int = 7
    action_bins: int = 256
    future_codes_only: bool = False
    slot_embedding: bool = False
    factored_tokens: bool = False
    proprio_dim: int = 0
    pose_dims: int = 0
    gripper_dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.pose_dims > self.proprio_dim:
            raise ValueError(f"pose_dims {self.pose_dims}: the proprio has {self.proprio_dim} dimensions")

    @property
    def layout(self) -> TokenLayout:
        """Ids and positions of a segment's tokens."""
        return TokenLayout(self.tokenizer, self.control_dim, self.action_bins)

    @property
    def control_dim(self) -> int:
        """Tokens C that stand for an action."""
        return self.pose_dims + len(self.gripper_dims) if self.pose_dims else self.action_dim


class State(NamedTuple):
    """Where an imagination stands; all its frames have one context.

    context: of the S starts.
    cache: keys and values of the context's tokens, one row per start; every chunk begins with them.
    tokens: (S, G, Nf) int64, of each member's latest frame, which is the first frame of the next chunk.
    robot: (S, G, P), at that frame; None if it is not known, or if the model does not predict it.
    """

    context: Context
    cache: KVCache
    tokens: Tensor
    robot: RobotState | None = None


class Rollout(NamedTuple):
    """Imagined frames 1..T: tokens (S, G, T, Nf) int64 and frames (S, G, T, C, H, W) in [0, 1].

    `state` is where the rollout ended: `WorldModel.rollout` goes on from it.
    """

    tokens: Tensor
    frames: Tensor
    state: State


class Tables(NamedTuple):
    """Weights of the embedding and of the head, one row per token id, (vocabulary, D) each."""

    embedding: Tensor
    head: Tensor


class ClosedLoop(NamedTuple):
    """Frame-by-frame imagination of S starts.

    state: at the last border of chunks, but for the robot, which is at the latest frame.
    cache: of the running chunk, whose number of frames is `step`.
    pending: (S, n) ids that the cache does not hold yet.
    """

    state: State
    tables: Tables
    cache: KVCache
    pending: Tensor
    step: int
    sampling: Sampling
    generator: torch.Generator | None


class WorldModel(HubModel, nn.Module):
    """Frozen tokenizer, action bins, embedding, decoder and head; and, with `proprio_dim`, the robot's state model.

    Raises:
        ValueError: a segment has more tokens than the transformer has positions.
    """

    def __init__(self, cfg: WorldModelConfig) -> None:
        super().__init__()
        self.cfg, self.layout = cfg, cfg.layout
        if self.layout.length(cfg.chunk) > cfg.transformer.max_positions:
            raise ValueError(
                f"a segment of {cfg.chunk} actions has {self.layout.length(cfg.chunk)} tokens, more than "
                f"transformer.max_positions={cfg.transformer.max_positions}"
            )
        self.tokenizer = FrameTokenizer(cfg.tokenizer)
        self.action_bins = ActionBins(cfg.control_dim, cfg.action_bins)
        self.embed_tokens = nn.Embedding(self.layout.vocab_size, cfg.transformer.width)
        self.decoder = Decoder(cfg.transformer)
        self.lm_head = nn.Linear(cfg.transformer.width, self.layout.vocab_size, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=cfg.transformer.init_std)
        nn.init.normal_(self.lm_head.weight, std=cfg.transformer.init_std)
        if cfg.slot_embedding:
            self.embed_slots = nn.Embedding(self.layout.num_slots, cfg.transformer.width)
            nn.init.normal_(self.embed_slots.weight, std=cfg.transformer.init_std)
        if cfg.factored_tokens:
            self.register_buffer("token_values", self._token_values(), persistent=False)
            num_values = self.token_values.shape[1]
            self.embed_values = nn.Linear(num_values, cfg.transformer.width, bias=False)
            self.head_values = nn.Linear(num_values, cfg.transformer.width, bias=False)
            nn.init.normal_(self.embed_values.weight, std=cfg.transformer.init_std)
            nn.init.normal_(self.head_values.weight, std=cfg.transformer.init_std)
        self.robot = ProprioModel(cfg.proprio_dim, cfg.action_dim).requires_grad_(False) if cfg.proprio_dim else None
        self.tokenizer.requires_grad_(False)
        self.tokenizer.eval()
        self._closed_loop: ClosedLoop | None = None
        self._static_decoding: tuple[tuple, StaticDecoding] | None = None

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "WorldModel":
        """Load a world model, its tokenizer included, from its `model.safetensors`, in eval mode."""
        return load_model(path, cls, WorldModelConfig, device)[0]

    def to_bfloat16(self) -> "WorldModel":
        """Cast the networks of a rollout to bfloat16, in place: transformer, embeddings, head and the pixel decoder.

        The networks that tokenise the starts stay in float32: they run once per start, and their tokens stay the same.
        """
        precise = "tokenizer", "action_bins", "robot"
        imagining = [module for name, module in self.named_children() if name not in precise]
        for module in (*imagining, self.tokenizer.cond_decoder, self.tokenizer.post_quant_linear):
            module.to(torch.bfloat16)
        if self.cfg.factored_tokens:
            self.token_values = self.token_values.to(torch.bfloat16)
        return self

    def _token_values(self) -> Tensor:
        """Describe what ids stand for, (vocabulary, F): one-hot FSQ digits, or an action value and its sinusoids."""
        blocks = []
        for fsq in (self.tokenizer.future_fsq, self.tokenizer.context_fsq):  # in the order of their ids
            digits = fsq.digits(torch.arange(fsq.num_codes)).T  # one row per scalar
            blocks.append(torch.cat([F.one_hot(row, n).float() for row, n in zip(digits, fsq.sizes, strict=True)], 1))
        value = torch.linspace(-1, 1, self.cfg.action_bins)[:, None]
        phases = value * torch.tensor([1.0, 2.0, 4.0, 8.0]) * torch.pi / 2
        blocks.append(torch.cat([2 * value, phases.sin(), phases.cos()], dim=1))
        values = torch.block_diag(*blocks)  # each kind of token has its own columns
        return F.pad(values, (0, 0, 0, self.layout.vocab_size - len(values)))  # zero rows for BOS and EOS

    def tables(self) -> Tables:
        """Compute the rows that `embed` and the head use; once is enough for a whole rollout."""
        embedding, head = self.embed_tokens.weight, self.lm_head.weight
        if self.cfg.factored_tokens:
            embedding, head = (
                embedding + self.embed_values(self.token_values),
                head + self.head_values(self.token_values),
            )
        return Tables(embedding, head)

    def embed(self, ids: Tensor, tables: Tables, positions: Tensor | None = None) -> Tensor:
        """Embed ids (B, N) that stand at `positions` (N,), by default 0..N-1: (B, N, D)."""
        x = F.embedding(ids, tables.embedding)
        if self.cfg.slot_embedding:
            positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
            x = x + self.embed_slots(self.layout.slots(positions))
        return x

    def next_logits(self, ids: Tensor, tables: Tables, cache: Cache) -> Tensor:
        """Feed ids (B, N) to the decoder; return the logits (B, V) float32 of the frame token that follows them."""
        positions = cache.positions(ids.shape[1], ids.device)
        hidden = self.decoder(self.embed(ids, tables, positions), cache)[:, -1]  # (B, D)
        # a frame consists of future codes only, which have the first ids
        return F.linear(hidden, tables.head[: self.layout.num_future_codes]).float()

    def train(self, mode: bool = True) -> "WorldModel":
        """Set training mode for all but the tokenizer, which is frozen and stays in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def controls(self, actions: Tensor, proprio_after: Tensor) -> Tensor:
        """Make what drives the frames: the actions, or where they led.

        Args:
            actions: (..., A) raw.
            proprio_after: (..., P) raw, after each action.

        Returns:
            (..., C).
        """
        if not self.cfg.pose_dims:
            return actions
        pose, grippers = proprio_after[..., : self.cfg.pose_dims], actions[..., list(self.cfg.gripper_dims)]
        return torch.cat([pose, grippers], dim=-1)

    def _move(
        self, robot: RobotState | None, actions: Tensor, proprio_after: Tensor | None = None
    ) -> tuple[Tensor, RobotState | None]:
        """Predict where the robot goes, and make what drives the frames.

        Args:
            robot: (S, 1 or G, P), None = not known.
            actions: (S, G, T, A) raw.
            proprio_after: (S, G, T, P), recorded; None = predict it.

        Returns:
            Controls (S, G, T, C), and the robot after the actions, (S, G, P).

        Raises:
            ValueError: poses drive the model, and nothing says where the robot is; or states of other steps.
        """
        if proprio_after is not None:
            if proprio_after.shape[:3] != actions.shape[:3]:
                raise ValueError(
                    f"proprio_after has shape {tuple(proprio_after.shape)}, expected (S, G, T, P) with "
                    f"{tuple(actions.shape[:3])} first, as the actions"
                )
            # one action from an unknown place: no motion
            first = proprio_after[:, :, -1] if robot is None else robot.proprio.expand(-1, actions.shape[1], -1)
            before = torch.cat([first[:, :, None], proprio_after], dim=2)[:, :, -2]
            after = RobotState(proprio_after[:, :, -1], proprio_after[:, :, -1] - before)
            return self.controls(actions, proprio_after), after if self.robot else None
        if robot is None or self.robot is None:
            if self.cfg.pose_dims:
                raise ValueError(
                    "poses drive this world model: give the robot's state at the first frame, "
                    "robot=RobotState(proprio, motion)"
                )
            return actions, None
        start = RobotState(*(part.expand(-1, actions.shape[1], -1).flatten(0, 1) for part in robot))
        with torch.autocast(actions.device.type, enabled=False):
            proprio, end = self.robot.rollout(start, actions.float().flatten(0, 1))
        end = RobotState(*(part.unflatten(0, actions.shape[:2]) for part in end))
        return self.controls(actions, proprio.unflatten(0, actions.shape[:2])), end

    @torch.no_grad()
    def tokenize(self, frames: Tensor, context_frame: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokenize segments in one batched pass.

        Args:
            frames: (B, L, C, H, W) in [0, 1].
            context_frame: (B, C, H, W); None = the segments' first frames.

        Returns:
            Context tokens (B, Nc) and future tokens (B, L, Nf).
        """
        context = self.tokenizer.encode_context(frames[:, 0] if context_frame is None else context_frame)
        return context.tokens, self.tokenizer.encode_future(frames, context)

    def loss(
        self, frames: Tensor, actions: Tensor, context_frame: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the next-token loss of segments, Eq. (3).

        Args:
            frames: (B, T + 1, C, H, W) in [0, 1].
            actions: (B, T, C), see `controls`, between the frames.
            context_frame: (B, C, H, W); None = the first frames.

        Returns:
            See `token_loss`.
        """
        return self.token_loss(*self.tokenize(frames, context_frame), actions)

    def token_loss(
        self, context_tokens: Tensor, future_tokens: Tensor, actions: Tensor, stale: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute Eq. (3) from tokens: cross-entropy, a mean over all predicted tokens.

        Args:
            context_tokens: (B, Nc).
            future_tokens: (B, T + 1, Nf).
            actions: (B, T, C), see `controls`.
            stale: (B, T + 1) bool, frames whose tokens are replaced by those of frame 0 in the input, not in the
                targets; None = none. Where a step moves little, copying the last frame is nearly right, and training
                learns to use the actions late; with stale frames the model has to add their motion up.

        Returns:
            The scalar loss in nats, float32, and metrics: `accuracy` (teacher-forced, of frame tokens),
            `accuracy_changed` (of those that differ from the same token of the frame before) and `outside` (share of
            action values beyond the stored ranges).
        """
        num_actions = actions.shape[1]
        bins = self.action_bins.encode(actions)
        ids = self.layout.sequence(context_tokens, future_tokens, bins)  # (B, N)
        inputs = ids
        if stale is not None:
            frames = torch.where(stale[..., None], future_tokens[:, :1], future_tokens)
            inputs = self.layout.sequence(context_tokens, frames, bins)
        targets = self.layout.frame_positions(num_actions).flatten().to(ids.device)
        tables = self.tables()
        # the token at position n is predicted at n - 1; the head runs at the targets only
        hidden = self.decoder(self.embed(inputs[:, :-1], tables))[:, targets - 1]  # (B, targets, D)
        head = tables.head[: self.layout.num_future_codes if self.cfg.future_codes_only else None]
        logits = F.linear(hidden, head).float()  # (B, targets, V or whole vocabulary)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, targets].flatten())
        with torch.no_grad():
            right = (logits.argmax(-1) == ids[:, targets]).float()  # (B, T * Nf)
            changed = (future_tokens[:, 1:] != future_tokens[:, :-1]).flatten(1).float()
            accuracy_changed = (right * changed).sum() / changed.sum().clamp_min(1)  # 0 if nothing changed
        metrics = {
            "accuracy": right.mean(),
            "accuracy_changed": accuracy_changed,
            "outside": self.action_bins.outside(actions),
        }
        return loss, metrics

    @torch.no_grad()
    def begin(self, context_frame: Tensor, first_frame: Tensor | None = None, robot: RobotState | None = None) -> State:
        """Tokenise the starts of imaginations and run their contexts through the transformer.

        Args:
            context_frame: (S, C, H, W) in [0, 1], the context of all frames to come.
            first_frame: (S, C, H, W), frame 0 if it is not the context frame.
            robot: (S, P), at frame 0; needed if poses drive the model.

        Returns:
            The state before the first action, with one member per start; `rollout` takes it with any number.
        """
        context = self.tokenizer.encode_context(context_frame)
        first = context_frame if first_frame is None else first_frame
        tokens = self.tokenizer.encode_future(first[:, None], context)  # (S, 1, Nf)
        cache = KVCache(len(context_frame), self.layout.context_length)
        self.decoder(self.embed(self.layout.context_ids(context.tokens), self.tables()), cache)
        robot = None if robot is None or self.robot is None else RobotState(*(part[:, None] for part in robot))
        return State(context, cache, tokens, robot)

    @torch.no_grad()
    def rollout(
        self,
        start: Tensor | State,
        actions: Tensor,
        *,
        greedy: bool = False,
        temperature: float = 1.0,
        top_p: float = 0.8,
        generator: torch.Generator | None = None,
        common_random_numbers: bool = False,
        first_frame: Tensor | None = None,
        robot: RobotState | None = None,
        proprio_after: Tensor | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Rollout:
        """Imagine the frames that follow each of G sequences of actions from each of S starts, Eq. (2) and (10).

        Up to `chunk` actions are the paper's rollout. Longer ones go on in chunks: the tokens of a chunk's last frame
        are the next chunk's first frame, and the context stays. Nothing is decoded and encoded in between, so what
        stands still does not fade. The model sees one chunk at a time, as in training.

        Args:
            start: (S, C, H, W) in [0, 1], context frame and frame 0; or the state of a rollout that is to go on, with
                one member per start or with G.
            actions: (S, G, T, A) raw environment actions, any number T of them.
            greedy, temperature, top_p, common_random_numbers: see `Sampling`.
            generator: source of the random numbers; the same seed gives the same rollout and, with common random
                numbers, the same numbers for any G.
            first_frame: (S, C, H, W), frame 0 if it is not the context frame.
            robot: (S, P), at frame 0; needed if poses drive the model.
            proprio_after: (S, G, T, P), raw, after each action; None = predict it from `robot`.
            part: see `Sampling`.

        Returns:
            Tokens and frames of steps 1..T, and the state after them.

        Raises:
            ValueError: actions of another shape than the start asks for, or none; a first frame or a robot beside a
                state; poses drive the model, and nothing says where the robot is.
        """
        if isinstance(start, State) and (first_frame is not None or robot is not None):
            raise ValueError("a state has first frame and robot already: give them with a context frame only")
        state = start if isinstance(start, State) else self.begin(start, first_frame, robot)
        self._check_actions(state, actions, self.cfg.action_dim)
        controls, robot = self._move(state.robot, actions, proprio_after)
        sampling = Sampling(greedy, temperature, top_p, common_random_numbers, part)
        tokens = self.rollout_tokens(state, controls, sampling, generator)
        frames = self.tokenizer.decode(tokens, state.context)
        return Rollout(tokens, frames, state._replace(tokens=tokens[:, :, -1], robot=robot))

    def _check_actions(self, state: State, actions: Tensor, width: int) -> None:
        """Raise a ValueError if these are no actions (S, G, T, `width`) of the state's starts."""
        starts, members = state.tokens.shape[:2]
        given = actions.shape
        if actions.ndim != 4 or (given[0], given[3]) != (starts, width) or not given[2]:
            raise ValueError(
                f"expected actions (S, G, T, {width}) with S = {starts} starts and T > 0, got "
                f"shape {tuple(given)}; add a group axis of 1 for single rollouts"
            )
        if members not in (1, given[1]):
            raise ValueError(f"the state has {members} members per start, the actions have {given[1]}")

    @torch.no_grad()
    def rollout_tokens(
        self,
        state: State,
        actions: Tensor,
        sampling: Sampling,
        generator: torch.Generator | None = None,
        static: bool | None = None,
    ) -> Tensor:
        """Sample the tokens of a rollout: (S, G, T, Nf).

        Arguments and errors as in `rollout`, but for the actions.

        Args:
            actions: (S, G, T, C), see `controls`.
            static: decode with `StaticDecoding`, which keeps its memory and its CUDA graphs for the next rollout of the
                same sizes; the parameters must stay at their addresses. None = for a frozen model on a GPU.
        """
        self._check_actions(state, actions, self.cfg.control_dim)
        self.action_bins.warn_outside(actions)
        group_size, tables = actions.shape[1], self.tables()
        tokens = state.tokens.expand(-1, group_size, -1).flatten(0, 1)  # (B, Nf), frame 0
        bins = rearrange(self.action_bins.encode(actions), "s g t a -> (s g) t a")
        chunks = self.layout.action_ids(bins).split(self.cfg.chunk, dim=1)  # (B, T, A) in chunks
        if static is None:
            static = bins.is_cuda and not any(p.requires_grad for p in self.parameters())
        decoding = noise = None
        if static:
            decoding = self._static(state.cache, group_size, sampling)
            if not sampling.greedy:
                noise = functools.partial(sampling.noise, *decoding.noise.shape, generator, bins.device)
        frames = []
        for ids in chunks:
            if decoding is None:
                new = self._sample_chunk(state.cache, tokens, ids, tables, sampling, group_size, generator)
            else:
                new = decoding.run(state.cache, tables, tokens, ids, noise)
            frames.append(new)  # (B, T, Nf)
            tokens = new[:, -1]
        return rearrange(torch.cat(frames, dim=1), "(s g) t n -> s g t n", g=group_size)

    def _sample_chunk(
        self,
        context_cache: KVCache,
        tokens: Tensor,
        action_ids: Tensor,
        tables: Tables,
        sampling: Sampling,
        group_size: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Sample the frames (B, T, Nf) that follow a frame (B, Nf), given the ids (B, T, A) of at most a chunk."""
        step_length = self.layout.step_length
        room = self.layout.frame_length + action_ids.shape[1] * step_length
        cache = context_cache.expand(group_size, room, block=step_length)  # S -> B rows
        pending, frames = tokens, []  # ids that the cache does not hold yet
        for step in range(action_ids.shape[1]):
            pending = torch.cat([pending, action_ids[:, step]], dim=1)
            tokens = self._sample_frame(cache, pending, tables, sampling, group_size, generator)  # (B, Nf)
            frames.append(tokens)
            pending = tokens[:, -1:]  # the frame's last token was sampled but not fed: it goes in with the next action
        return torch.stack(frames, dim=1)

    def _next_token(
        self, sampling: Sampling, ids: Tensor, tables: Tables, cache: StaticKVCache, noise: Tensor
    ) -> Tensor:
        """Feed ids (B, N) to the decoder and choose the tokens (B,) that follow them."""
        return sampling.pick(self.next_logits(ids, tables, cache), noise)

    def _static(self, context_cache: KVCache, group_size: int, sampling: Sampling) -> StaticDecoding:
        """Return the decoding of the last rollout if sizes and settings are the same, else replace it by a new one."""
        like = context_cache.own[0][0]
        key = (like.shape, like.dtype, like.device, group_size, sampling)
        if self._static_decoding is None or self._static_decoding[0] != key:
            self._static_decoding = None  # frees its memory before the new one allocates
            layout = self.layout
            room = layout.frame_length + self.cfg.chunk * layout.step_length
            cache = StaticKVCache(context_cache, group_size, room)
            noise_shape = sampling.noise_rows(cache.batch_size, group_size), layout.num_future_codes
            next_token = functools.partial(self._next_token, sampling)
            lengths = layout.frame_length, layout.action_length
            self._static_decoding = key, StaticDecoding(next_token, cache, *lengths, noise_shape)
        return self._static_decoding[1]

    @torch.no_grad()
    def divergence(self, frames: Tensor, actions: Tensor, reference: Tensor, robot: RobotState | None = None) -> Tensor:
        """Measure how much each of G action chunks changes the model's predictions, compared with reference actions.

        The Kullback-Leibler divergence KL(reference || chunk) of the next-token distributions, summed over the tokens
        of a frame. The preceding tokens are always the demonstration's (teacher forcing, as in training), so one pass
        suffices: nothing is sampled or decoded. The divergence is 0 at the reference actions and smooth around them,
        whereas an imagined frame changes by whole tokens.

        Args:
            frames: (S, T + 1, C, H, W) in [0, 1] of the demonstrations; the first is the start of all chunks.
            actions: (S, G, T, A) raw environment actions.
            reference: (S, T, A) raw.
            robot: (S, P), at the first frame; needed if poses drive the model.

        Returns:
            (S, G, T) float32 [nats].
        """
        members, num_actions = actions.shape[1] + 1, actions.shape[2]
        robot = None if robot is None else RobotState(*(part[:, None] for part in robot))
        controls, _ = self._move(robot, torch.cat([reference[:, None], actions], 1))  # (S, 1 + G, T, C)
        self.action_bins.warn_outside(controls)
        tables = self.tables()
        head = tables.head[: self.layout.num_future_codes]
        before = self.layout.frame_positions(num_actions).flatten() - 1  # where the frames' tokens are predicted
        # temporaries of one member: about eight activations per token, and the logits
        values = 8 * self.cfg.transformer.width * self.layout.length(num_actions) + 4 * len(before) * len(head)
        at_once = rows_at_once(4 * values * members, frames.device)  # starts
        parts = []
        for segment, chunks in zip(frames.split(at_once), controls.split(at_once), strict=True):
            context, tokens = self.tokenize(segment)  # (n, Nc), (n, T + 1, Nf)
            bins = self.action_bins.encode(chunks).flatten(0, 1)  # n * (1 + G) rows
            ids = self.layout.sequence(*(v.repeat_interleave(members, 0) for v in (context, tokens)), bins)
            hidden = self.decoder(self.embed(ids[:, :-1], tables))[:, before]  # (n * (1 + G), T * Nf, D)
            log_prob = F.linear(hidden, head).float().log_softmax(-1).unflatten(0, (-1, members))
            q, p = log_prob[:, 1:], log_prob[:, :1]  # chunks (n, G, T * Nf, V), reference (n, 1, T * Nf, V)
            parts.append((p.exp() * (p - q)).sum(-1).unflatten(-1, (num_actions, -1)).sum(-1))  # (n, G, T)
        return torch.cat(parts)

    @torch.no_grad()
    def reset(
        self,
        context_frame: Tensor,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
        robot: RobotState | None = None,
    ) -> None:
        """Start frame-by-frame imagination, the same as `rollout` one action at a time.

        Args:
            context_frame: (S, C, H, W) in [0, 1].
            sampling: None = greedy.
            generator: source of the random numbers.
            robot: (S, P), at that frame; needed if poses drive the model.
        """
        state, tables = self.begin(context_frame, robot=robot), self.tables()
        self._closed_loop = self._new_chunk(state, tables, sampling or Sampling(greedy=True), generator)

    def _new_chunk(
        self, state: State, tables: Tables, sampling: Sampling, generator: torch.Generator | None
    ) -> ClosedLoop:
        """Begin a chunk of frame-by-frame imagination."""
        cache = state.cache.expand(1, self.layout.frame_length + self.cfg.chunk * self.layout.step_length)
        return ClosedLoop(state, tables, cache, state.tokens[:, 0], 0, sampling, generator)

    @torch.no_grad()
    def step(self, action: Tensor) -> Tensor:
        """Imagine one more frame.

        Args:
            action: (S, A) raw environment action.

        Returns:
            (S, C, H, W) frame in [0, 1].

        Raises:
            ValueError: `reset` was not called.
        """
        loop = self._closed_loop
        if loop is None:
            raise ValueError("step() needs a start: call reset(context_frame) first")
        controls, robot = self._move(loop.state.robot, action[:, None, None])  # (S, 1, 1, C)
        self.action_bins.warn_outside(controls)
        state = loop.state._replace(robot=robot)
        pending = torch.cat([loop.pending, self.layout.action_ids(self.action_bins.encode(controls[:, 0, 0]))], dim=1)
        tokens = self._sample_frame(loop.cache, pending, loop.tables, loop.sampling, 1, loop.generator)  # (S, Nf)
        if loop.step + 1 == self.cfg.chunk:
            state = state._replace(tokens=tokens[:, None])
            self._closed_loop = self._new_chunk(state, loop.tables, loop.sampling, loop.generator)
        else:
            self._closed_loop = loop._replace(state=state, pending=tokens[:, -1:], step=loop.step + 1)
        return self.tokenizer.decode(tokens[:, None], loop.state.context)[:, 0]

    def _sample_frame(
        self,
        cache: KVCache,
        pending: Tensor,
        tables: Tables,
        sampling: Sampling,
        group_size: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Feed pending ids (B, n) and sample the Nf tokens of one frame; the last one must be fed by the next call."""
        tokens = []
        for _ in range(self.layout.frame_length):
            logits = self.next_logits(pending, tables, cache)
            pending = sampling.sample(logits, group_size, generator)[:, None]  # (B, 1)
            tokens.append(pending)
        return torch.cat(tokens, dim=1)


PRESETS = {
    "paper": WorldModelConfig(),
    "small": WorldModelConfig(
        tokenizer=TOKENIZERS["small"],
        transformer=TransformerConfig(depth=8, width=512, num_heads=8, num_kv_heads=8, ffn_dim=1536),
    ),
    "tiny": WorldModelConfig(
        tokenizer=TOKENIZERS["tiny"],
        transformer=TransformerConfig(depth=4, width=96, num_heads=3, num_kv_heads=3, ffn_dim=256, init_std=0.06),
        future_codes_only=True,
        slot_embedding=True,
        factored_tokens=True,
    ),
    "smoke": WorldModelConfig(
        tokenizer=TOKENIZERS["smoke"],
        transformer=TransformerConfig(depth=1, width=32, num_heads=2, num_kv_heads=2, ffn_dim=64),
        action_bins=32,
        future_codes_only=True,
        slot_embedding=True,
        factored_tokens=True,
    ),
}
