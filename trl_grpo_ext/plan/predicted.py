"""The curriculum that guesses: which prompts teach, among those never drawn too."""

from typing import Any

import torch
from torch import Tensor

from ..hooks.ground import HookedTrainer
from ..hooks.records import RolloutBatch
from ..host.state import check_state
from .columns import fetched_rows
from .curriculum import Curriculum, with_exploration
from .posterior import PromptPosterior
from .predictor import RidgePredictor, explained_variance, prompt_text, text_features


class PredictedCurriculumCallback(Curriculum):
    """
    Draw the prompts on which learning is possible now, those never drawn before included.

    Two [`RidgePredictor`]s on features of the prompt's text guess the reward of a prompt and how far that guess will be
    off. Prompts are drawn with probability proportional to a power of the variance so expected. Once a prompt was
    drawn, its own rewards count more and more ([`PromptPosterior`]). Works with groups of any size, of one too.
    Logs `curriculum/effective_prompts` as [`OnlineCurriculumCallback`] does, and `curriculum/explained_variance`, the
    share of the variance of rewards that the guess foresaw. `curriculum/explained_variance_unseen` is the same for
    prompts never drawn before.

    Args:
        power (`float`, *optional*, defaults to `2.0`):
            Exponent. 0 is uniform; the larger, the sharper.
        exploration (`float`, *optional*, defaults to `0.1`):
            Share of the prompts drawn from the whole dataset.
        decay (`float`, *optional*, defaults to `0.5`):
            Weight of the old evidence at each visit of a prompt.
        prior (`float`, *optional*, defaults to `2.0`):
            Weight of the guess, in completions.
    """

    def __init__(self, power: float = 2.0, exploration: float = 0.1, decay: float = 0.5, prior: float = 2.0):
        if not power >= 0:
            raise ValueError(f"power={power} must not be negative: use 0 to draw all prompts alike")
        self.power, self.exploration, self.decay, self.prior = power, exploration, decay, prior
        self._check()

    def on_setup(self, trainer: HookedTrainer, **kwargs: Any) -> None:
        prompts = trainer.train_dataset
        self.features = text_features(prompt_text(row["prompt"]) for row in fetched_rows(prompts, ["prompt"]))
        self.posterior = PromptPosterior(len(prompts), self.decay, self.prior)
        self.reward, self.variance = (RidgePredictor(self.features.size(1)) for _ in range(2))
        self._effective = float(len(prompts))

    def on_prompt_weights(self, weights: Tensor, **kwargs: Any) -> Tensor:
        variance = self.posterior.variance(expected=self.expected_variance())
        mine = with_exploration(variance.div_(variance.max()).pow_(self.power), self.exploration)
        self._effective = 1 / mine.square().sum().item()
        return mine.mul_(weights)

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        for part in batch.parts:
            mean, std, count = part.group_stats()
            index = part.prompt_index
            assert index is not None  # because this callback chooses the prompts
            features = self.features[index]
            guess = self.reward.predict(features)
            unseen = torch.where(self.posterior.count[index] > 0, torch.nan, mean)
            for name, values in (("explained_variance", mean), ("explained_variance_unseen", unseen)):
                explained = explained_variance(guess, values)
                if explained is not None:
                    batch.metrics[f"curriculum/{name}"] = explained
            self.reward.learn(features, mean)
            # Of a group of one: how far off the guess is once it has learnt from this batch.
            surprise = (mean - self.reward.predict(features)).square()
            variance = torch.where(count >= 2, std.square(), surprise)
            self.variance.learn(features, variance)
            is_known = mean.isfinite()
            self.posterior.learn(index[is_known], mean[is_known], variance[is_known], count[is_known])
        batch.metrics["curriculum/effective_prompts"] = self._effective

    def expected_variance(self, prompt_index: Tensor | None = None) -> Tensor | None:
        """
        Variance of the reward that the text makes expect, `(P,)` or `(D,)` for all prompts.

        `None` as long as nothing is known.
        """
        if not self.variance.count > 0:
            return None
        expected = self.variance.predict(self.features if prompt_index is None else self.features[prompt_index])
        # A regression may go below zero: no prompt is ruled out for that.
        return expected.clamp(min=0.01 * expected.max().clamp(min=1e-12).item())

    def state_dict(self) -> dict[str, Any]:
        predictors = {"reward": self.reward.state_dict(), "variance": self.variance.state_dict()}
        return {"posterior": self.posterior.state_dict(), **predictors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, posterior=dict, reward=dict, variance=dict)
        self.posterior.load_state_dict(state_dict["posterior"])
        self.reward.load_state_dict(state_dict["reward"])
        self.variance.load_state_dict(state_dict["variance"])
