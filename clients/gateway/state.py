"""What the endpoints of one gateway share: its settings, the Tritons, its metrics, and each model's texts."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from clients.gateway.errors import ApiError
from clients.gateway.metrics import Metrics
from clients.gateway.pool import Pool
from clients.gateway.rendering import Renderer
from clients.gateway.settings import Settings
from clients.gateway.texts import ModelTexts, find_folder, read_texts, state_of

logger = logging.getLogger(__name__)

FRESH_S = 1.0  # for how long the files of a model count as those that were read


@dataclass(kw_only=True)
class _Known:
    """What was read of a model, and what its files were when that was."""

    texts: ModelTexts
    state: tuple[object, ...]
    looked_s: float  # time.monotonic of the last look at the files
    renderer: Renderer | None = None


class Gateway:
    """The state of a running gateway. Enter it in the loop that serves."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.pool: Pool  # from `__aenter__` on
        self._texts: dict[str, _Known] = {}
        self._reading = asyncio.Lock()

    async def __aenter__(self) -> Gateway:
        self.pool = await Pool(self.settings, self.metrics.retried).__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.gather(*(known.renderer.close() for known in self._texts.values() if known.renderer))
        await self.pool.__aexit__(kind, error, traceback)

    def check_model(self, model: str) -> None:
        """Raise ApiError for a model that no Triton has ready."""
        if model not in self.pool.models():
            raise self.pool.absent(model)

    async def texts(self, model: str) -> ModelTexts:
        """The tokenizer of a model, and the facts beside it, read when it is first needed and where its files were
        replaced. Raises ApiError where the gateway has no files of the model, and CheckpointError or ConfigError for
        damaged ones."""
        return (await self._known(model)).texts

    async def texts_if_any(self, model: str) -> ModelTexts | None:
        """The same; None where the gateway has no files of the model."""
        return None if self._find(model) is None else await self.texts(model)

    async def renderer(self, model: str) -> Renderer:
        """What renders a model's chat template. Raises as `texts`, and ApiError for a model without a template."""
        known = await self._known(model)
        if known.texts.template is None:
            raise ApiError(
                f"the model {model!r} has no chat template, so that it takes no messages; use /v1/completions, or have "
                "the gateway started with --chat-template FILE", param="messages", code="no_chat_template",
            )  # fmt: skip
        if known.renderer is None:
            known.renderer = Renderer(known.texts.template, known.texts.special_tokens)
        return known.renderer

    async def _known(self, model: str) -> _Known:
        """What is known of a model, looked after at most once in `FRESH_S`. Raises as `texts`."""
        self.check_model(model)
        known = self._texts.get(model)
        if known is not None and time.monotonic() - known.looked_s < FRESH_S:
            return known
        async with self._reading:
            known = self._texts.get(model)
            if known is None or time.monotonic() - known.looked_s >= FRESH_S:
                known = await self._look(model, known)
        return known

    async def _look(self, model: str, known: _Known | None) -> _Known:
        """What is known of a model, read anew where its files are not those that were read. The caller has the lock."""
        template, looked_s = self.settings.chat_template, time.monotonic()
        folder = await asyncio.to_thread(self._folder, model)
        state = await asyncio.to_thread(state_of, folder, template)
        if known is not None and known.state == state:
            known.looked_s = looked_s
            return known
        texts = await asyncio.to_thread(read_texts, folder, template)
        self._texts[model] = _Known(texts=texts, state=state, looked_s=looked_s)
        if known is not None:
            logger.info("the tokenizer of the model %s was replaced, and is read anew", model)
            if known.renderer is not None:
                known.renderer.retire()
        return self._texts[model]

    def _find(self, model: str) -> Path | None:
        tokenizers, repository = self.settings.tokenizers, self.settings.repository
        folder = tokenizers.get(model) or tokenizers.get("")
        return folder or (find_folder(repository, model) if repository else None)

    def _folder(self, model: str) -> Path:
        folder = self._find(model)
        if folder is None:
            raise ApiError(
                f"this gateway has no tokenizer of the model {model!r}, which this request needs; have it started with "
                "--repository or --tokenizer", code="no_tokenizer",
            )  # fmt: skip
        return folder
