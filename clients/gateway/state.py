"""What the endpoints of one gateway share: its settings, the Tritons, its metrics, and each model's texts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import TracebackType

from clients.gateway.errors import ApiError
from clients.gateway.metrics import Metrics
from clients.gateway.pool import Pool
from clients.gateway.rendering import Renderer
from clients.gateway.settings import Settings
from clients.gateway.texts import ModelTexts, find_folder, read_texts


class Gateway:
    """The state of a running gateway. Enter it in the loop that serves."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.pool: Pool  # from `__aenter__` on
        self._texts: dict[str, ModelTexts] = {}
        self._renderers: dict[str, Renderer] = {}
        self._reading = asyncio.Lock()

    async def __aenter__(self) -> Gateway:
        self.pool = await Pool(self.settings, self.metrics.retried).__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.gather(*(renderer.close() for renderer in self._renderers.values()))
        await self.pool.__aexit__(kind, error, traceback)

    def check_model(self, model: str) -> None:
        """Raise ApiError for a model that no Triton has ready."""
        if model not in self.pool.models():
            raise self.pool.absent(model)

    async def texts(self, model: str) -> ModelTexts:
        """The tokenizer of a model, and the facts beside it, read when it is first needed. Raises ApiError where the
        gateway has no files of the model, and CheckpointError or ConfigError for damaged ones."""
        self.check_model(model)
        if model not in self._texts:
            async with self._reading:
                if model not in self._texts:
                    folder = self._folder(model)
                    read = asyncio.to_thread(read_texts, folder, self.settings.chat_template)
                    self._texts[model] = await read
        return self._texts[model]

    async def texts_if_any(self, model: str) -> ModelTexts | None:
        """The same; None where the gateway has no files of the model."""
        return None if self._find(model) is None else await self.texts(model)

    async def renderer(self, model: str) -> Renderer:
        """What renders a model's chat template. Raises as `texts`, and ApiError for a model without a template."""
        texts = await self.texts(model)
        if texts.template is None:
            raise ApiError(
                f"the model {model!r} has no chat template, so that it takes no messages; use /v1/completions, or have "
                "the gateway started with --chat-template FILE", param="messages", code="no_chat_template",
            )  # fmt: skip
        if model not in self._renderers:
            self._renderers[model] = Renderer(texts.template, texts.special_tokens)
        return self._renderers[model]

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
