"""Going on with a run: the newest checkpoint that is sound, and whether this is still that run."""

from collections.abc import Collection
from pathlib import Path

from lowmem_grpo.config import Config
from lowmem_grpo.errors import ConfigError
from lowmem_grpo.policy.integrity import Base
from lowmem_grpo.pool import Pool, check_base, check_pool
from lowmem_grpo.run.changed import changed_mathematics
from lowmem_grpo.run.checkpoint import State, load_checkpoint, newest_sound, read_state
from lowmem_grpo.run.console import Console
from lowmem_grpo.run.inputs import TEMPLATE, Inputs, changed_inputs, input_files, template_digest

__all__ = ["Resumed"]


class Resumed:
    """The run in a directory, or a new one for None. `checkpoint`: what it goes on from; None where
    it is new, or was killed before there was one.

    Raises DamageError where no checkpoint is sound, ConfigError for settings, or the content of
    files, that changed and are not `allowed` to.
    """

    def __init__(
        self,
        run_path: Path | None,
        config: Config,
        allowed: Collection[str],
        console: Console,
    ):
        self._config, self._allowed, self._say = config, allowed, console.say
        self.checkpoint = None if run_path is None else newest_sound(run_path, console.warn)
        self._changed: list[str] = []
        self._inputs, self._inputs_before = input_files(config), Inputs()
        if self.checkpoint is not None:
            saved = read_state(self.checkpoint)
            self._changed = changed_mathematics(saved["config"], config, allowed)
            # None of a version that did not look at them.
            self._inputs_before = saved.get("inputs", Inputs())
            self._files_changed(allowed)

    def _files_changed(self, allowed: Collection[str]) -> None:
        more = changed_inputs(self._inputs_before, self._inputs, allowed)
        self._changed = sorted({*self._changed, *more})

    @property
    def adapter(self) -> Path | None:
        """The adapter that the run starts from, where that is still asked for: before there is a
        checkpoint, and for a reference that none has kept.
        """
        start, kept = self._config.model.adapter, self.checkpoint
        if start is None or (kept is not None and not self._config.keeps_reference):
            return None
        if kept is not None and (kept / "reference.safetensors").is_file():
            return None
        return Path(start).expanduser()

    def load(self, policy, optimizer, base: Base, pool: Pool | None) -> State:
        """Put adapters and moments in place and return the state. Raises ConfigError for another
        base, or another pool, and as `load_checkpoint` does.
        """
        if pool is not None:
            check_base(pool.path, pool.base, base)
        pool_size = len(pool) if pool is not None else None
        self._inputs[TEMPLATE] = template_digest(str(policy.tokenizer.chat_template))
        if self.checkpoint is None:
            return State(pool=pool_size, base=base.digest, inputs=self._inputs)
        self._files_changed(self._allowed)  # of the template, which came with the tokenizer
        state = load_checkpoint(self.checkpoint, policy, optimizer)
        check_pool(pool_size, state.pool)
        if base.is_other_than(state.base) and "model.lm_head_bits" not in self._changed:
            if "model.name" not in self._allowed:
                raise ConfigError(
                    f"--resume: the weights of {self._config.model.name} are not those that the "
                    "run was started with: bring those back, or --allow-changed model.name"
                )
            self._changed = sorted({*self._changed, "model.name"})
        state.base, state.inputs = base.digest, self._inputs
        self._say(f"resumed from {self.checkpoint} (step {state.step})")
        if self._changed:
            lost = "" if state.groups is None else ": the groups in hand are not used"
            self._say(f"changed since it was started: {', '.join(self._changed)}{lost}")
            state.groups = None
        return state
