"""What the model's own config.json sets a limit to."""

from __future__ import annotations

import json

from unift import needs
from unift.config import Config, evaluation_tokens, stages
from unift.dataset import Data
from unift.policy import locate
from unift.types import DataError


def check_positions(config: Config, data: Data) -> None:
    """DataError where prompt, hint and completion can take more tokens than the model has positions (its config.json;
    a GGUF file has none). Beyond them a model with learned positions fails, and one with rotary ones turns to noise."""
    path = locate(config.model.path) / "config.json"
    positions = json.loads(path.read_text(encoding="utf-8")).get("max_position_embeddings") if path.is_file() else None
    if not isinstance(positions, int):
        return
    found = [stage.rules for stage in stages(config)]
    hinted = any(needs.hints(s) for s in found)
    sampled = max([s.sample.max_tokens for s in found if s.sample.completions], default=0)
    evaluated = evaluation_tokens(config)
    for name, split, most in (("data.train", data.train, sampled), ("data.test", data.test, evaluated)):
        for number, e in enumerate(split.encoded, start=1):
            hint = e.step_ends[-1] if hinted and name == "data.train" else 0
            prompt = max(len(e.prompt), len(e.instructed or []))
            if prompt + hint + most > positions:
                raise DataError(
                    f"{name}, row {number}: the prompt ({prompt} tokens), its longest hint ({hint}) and a completion "
                    f"({most}) take more than the {positions} positions of the model. Lower sample.max_tokens to "
                    f"{max(positions - prompt - hint, 0)} or less, or drop the row"
                )
