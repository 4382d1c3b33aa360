"""The flags of a recipe that choose who judges harmlessness."""

from dataclasses import dataclass, field

from ..rewards import Harmlessness, Reward, RewardModel


@dataclass
class HarmlessnessArguments:
    """
    Who judges harmlessness: the shipped examples, a classifier, or a reward model.

    Parameters:
        harmlessness_model_name_or_path (`str`, *optional*):
            A sequence classification model. With `harmful_label`, 1 minus the probability of that label is the
            harmlessness; without, the model is a reward model, whose score is.
        harmful_label (`str`, *optional*):
            Name of the label that counts as harmful.
    """

    harmlessness_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Text classifier (with --harmful_label) or reward model for harmlessness. Without it: examples "
            "that come with the package."
        },
    )
    harmful_label: str | None = field(
        default=None, metadata={"help": "The classifier's label that counts as harmful, such as 'toxic'."}
    )

    def harmlessness(self) -> Reward:
        """
        The reward, called `harmlessness`.

        Example:

        ```python
        >>> HarmlessnessArguments("org/guard", "unsafe").harmlessness()
        Harmlessness(model='org/guard', harmful_label='unsafe')

        ```
        """
        if self.harmlessness_model_name_or_path is None:
            if self.harmful_label is not None:
                raise ValueError(
                    f"harmful_label={self.harmful_label!r} is a label of no model: pass "
                    "harmlessness_model_name_or_path as well"
                )
            return Harmlessness()
        if self.harmful_label is None:
            return RewardModel(self.harmlessness_model_name_or_path).named("harmlessness")
        return Harmlessness(self.harmlessness_model_name_or_path, self.harmful_label)
