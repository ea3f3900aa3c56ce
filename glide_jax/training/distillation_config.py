"""The fields of consistency distillation, part of a `TrainConfig`."""

from dataclasses import dataclass

from glide_jax.errors import UsageError, check_finite


@dataclass(frozen=True)
class DistillationConfig:
    """Consistency distillation of a trained model into a student that samples in few steps.

    Attributes:
        teacher: Weights to distil: a name, a folder, a `.pt` file or a run. The student starts from
            them unless `init_from` is set. Empty: no teacher; the training images take its place,
            as in consistency tuning (2406.14548), and no guidance is distilled.
        guidance_scales: Lowest and highest scale of the teacher's classifier-free guidance, 0 or
            more; 1 is off. With `model.guidance_scale_input` each training image has a random
            scale between them, and any such scale can be chosen for sampling. Otherwise the two
            must be equal.
        unguided_share: Share of the images with scale 1, from 0 to 1, if `guidance_scales` is a
            range. A larger share gives more training without guidance.
        teacher_steps: Number of teacher steps from noise to image. The first value is for the start
            of the training, the second for its end. In between the number doubles, at equal
            intervals. More is more accurate but takes longer to learn.
        student_steps: Number N of equal parts that the diffusion process is cut into (2403.06807).
            With 1, the student predicts the clean image from any noise level; sample with the
            sampler consistency. With N above 1, it predicts the noised image at the cleanest level
            of the part that the noise level is in, which is easier to learn; sample with N steps of
            ddim and the spacing trailing-capped.
        timestep_share: Share of the timesteps that is distilled, from the clean end, above 0 and up
            to 1. For upsamplers: their `sample_strength`, if set.
        clamp_x_0: Whether the estimates of the clean image in the target, those of the teacher and
            of the student, are clipped to [-1, 1].
        huber_width: Width c of the pseudo-Huber loss, sqrt(e^2 + c^2) - c; above 0. Here e is the
            root mean square error of v of an image, not the error of a pixel. The loss is quadratic
            for e well below c, and linear well above. Larger is closer to the squared error, and
            learns faster. Long trainings without a teacher use 0.00054 (2310.14189).
    """

    teacher: str = ""
    guidance_scales: tuple[float, float] = (1.0, 1.0)
    unguided_share: float = 0.1
    teacher_steps: tuple[int, int] = (8, 64)
    student_steps: int = 1
    timestep_share: float = 1.0
    clamp_x_0: bool = True
    huber_width: float = 0.1

    def __post_init__(self):
        check_finite(vars(self))
        low, high = self.guidance_scales
        if not 0 <= low <= high:
            raise UsageError(
                f"guidance_scales is a range of scales from 0 on, not {low:g} to {high:g}"
            )
        first, last = self.teacher_steps
        if not 1 <= first <= last:
            raise UsageError(f"teacher_steps grow from 1 or more, not {self.teacher_steps}")
        if not 1 <= self.student_steps <= first:
            raise UsageError(
                f"student_steps is from 1 to the number of teacher_steps, not {self.student_steps}"
            )
        for name in ("unguided_share", "timestep_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is a share from 0 to 1, not {getattr(self, name)}")
        for name in ("timestep_share", "huber_width"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)}")
