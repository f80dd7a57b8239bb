# %% [markdown]
# # 01 Pneumonia: how fragile is MobileNetV2, and which defence really helps?
#
# A MobileNetV2 that reads chest X-rays is right on about nine images in ten. Change every pixel by less than
# the eye can see, in just the right direction, and it is wrong on nearly all of them. This notebook measures
# that fragility and puts the published remedies to an honest test: each is trained with the same recipe, then
# attacked by the same suite of nine attacks, and judged by its worst case on every single image.
#
# **What you get**
#
# | part | question |
# |---|---|
# | 1 Data | What is in *Chest X-Ray Images (Pneumonia)*, and what in it would spoil an experiment? |
# | 2 Training | A baseline and its defences: Lipschitz regularisers, distillation, adversarial training, noise |
# | 3 Clean test | Accuracy, macro precision / recall / F1, ROC with AUC, calibration |
# | 4 FGSM as published | The eps grid of the study we redo, in its own (normalised) units |
# | 5 The suite | Nine attacks in pixel units, the worst case per image, and what it costs in each direction |
# | 6 Is it to be believed? | Masked gradients, and a check list with PASS or WARN for every model |
# | 7 A certificate | What randomised smoothing proves, and what it does not |
# | 8 One-Pixel | Differential evolution with 1 and 3 pixels |
# | 9 Verdict | Paired tests and a plain answer |
#
# What came out on the real images stands in [results/README.md](../results/README.md); the outputs stored in this file are from
# the smoke profile on *synthetic* images, and only show what you will see.
#
# Press *Run All*. Every section also runs alone after the opening cells, so you can copy one into a
# notebook of your own: trained models and finished tables are read back from the run folder.
#
# *For research and teaching. Not a medical device.*

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"  # "smoke" (two minutes), "cpu" (a laptop, five hours), "full" (GPU), or "auto"
DATA_DIR = ""  # empty: find the data set; else the folder of chest_xray, or your two class folders
RUN_NAME = ""  # empty: profile and kind of data
RESUME = True  # True: go on where a run stopped; False: anew; "force": under other settings
CHANGES = {}  # settings of your own, whatever the profile, such as {"epochs": 5}

# %% [markdown]
# **The settings.** FULL is the whole study; CPU and SMOKE are what is smaller on a laptop and in a first look. To change
# one, whatever the profile, write it into `CHANGES` above: `CHANGES = {"epochs": 5}`. A typo is told, a changed setting
# is starred below, and the run gets a folder of its own, which takes over whatever the change does not touch.
#
# **Your own images**: `DATA_DIR` may be any folder with a folder of images for each class (below `train`, `val` and
# `test` if you have a split). A CSV in it with the columns `file` and, as you have them, `label`, `patient`, `split`
# says more. Without patients every image counts as one: `patient_pattern` reads them from the file names.

# %% tags=["settings"]
from dlia_utils.attacks import evaluate
from dlia_utils.units import pixel_eps

# The data: per_class None is every image, a number a sample of each class; own images are split by
# these shares
FULL = {"dataset": "pneumonia", "seed": 0, "size": 224, "per_class": None, "val_share": 0.15}
FULL |= {"test_share": None, "unusable_share": 0.0, "classes": None, "patient_pattern": ""}
# MobileNetV2, and the recipe of every training; max_minutes is for one model, None is no limit
FULL |= {"width": 1.0, "stages": 7, "pretrained": True, "epochs": 25, "batch_size": 32, "lr": 1e-3}
FULL |= {"schedule": "onecycle", "patience": None, "max_minutes": 90.0, "num_workers": 2}
# Lipschitz models, margin penalty, distillation
FULL |= {"lipschitz_penalty": 0.05, "gradient_penalty": 3e-3, "temperatures": (35.0, 50.0)}
FULL |= {"alpha": 0.9}
# Adversarial training: which, on what ball; "free" makes free_epochs / free_replays passes and
# replays every batch, gairat goes on from pgd_at
FULL |= {"adversarial": ("pgd_at", "fast_at", "free_at", "trades", "mart", "hat", "gairat")}
FULL |= {"at_eps": 4 / 255, "at_steps": 7, "at_step_size": 1.5 / 255, "free_replays": 4}
FULL |= {"free_epochs": 60}
FULL |= {"gairat_epochs": 10, "gairat_steps": 10}
# Noise, and the certificate that it allows
FULL |= {"sigma": 0.12, "certified_per_class": 100, "certificate_draws": 1000}

# %% tags=["settings"]
# The attacks of the suite: add or leave out; their budgets; the eps at which expensive ones run, if
# not at all
FULL |= {"attacks": evaluate.SUITE, "eps_grid": pixel_eps(0.25, 0.5, 1, 2, 4, 8)}
FULL |= {"headline_eps": 4 / 255}
FULL |= {"published_eps_grid": (0.005, 0.01, 0.03, 0.05, 0.08, 0.1)}  # of FGSM, in normalised units
FULL |= {"pgd_steps": 20, "pgd_restarts": 2, "attack_batch": 128}
FULL |= {"budgets": {"square": {"steps": 2000}}}
FULL |= {"expensive": {"square": pixel_eps(4)}, "check_images": 50}
# One-Pixel: (pixels, population, iterations, F, CR) of the study that is redone here
FULL |= {"one_pixel": ((1, 60, 120, 0.5, 0.9), (1, 200, 120, 0.7, 1.0), (3, 60, 120, 0.5, 1.0))}
FULL |= {"one_pixel_per_class": 100, "bootstrap_draws": 2000}

# %% tags=["settings"]
EXPENSIVE = dict.fromkeys(("apgd_ce", "apgd_margin", "square"), pixel_eps(4))
SHORT = {name: {"steps": 30} for name in ("apgd_ce", "apgd_margin", "fmn")} | {
    "square": {"steps": 200}
}
CPU = {"size": 112, "epochs": 5, "num_workers": 0, "at_steps": 2, "at_step_size": 2.8 / 255}
CPU |= {"free_epochs": 12, "gairat_epochs": 2, "gairat_steps": 5, "certified_per_class": 40}
CPU |= {"eps_grid": pixel_eps(0.5, 1, 2, 4, 8), "pgd_steps": 10, "pgd_restarts": 1}
CPU |= {"budgets": SHORT}
CPU |= {"expensive": EXPENSIVE, "check_images": 24, "one_pixel_per_class": 8}

TINY = {"apgd_ce": {"steps": 4}, "apgd_margin": {"steps": 4}, "fmn": {"steps": 5}}
TINY |= {"square": {"steps": 10}}
SMOKE = {"size": 48, "per_class": 96, "width": 0.5, "stages": 3, "pretrained": "phantom"}
SMOKE |= {"epochs": 10}
SMOKE |= {"batch_size": 16, "lr": 2e-3, "num_workers": 0, "max_minutes": None}
SMOKE |= {"temperatures": (50.0,)}
SMOKE |= {"at_steps": 2, "at_step_size": 2.8 / 255, "gradient_penalty": 1e-3}
SMOKE |= {"adversarial": ("pgd_at", "trades"), "sigma": 0.05, "eps_grid": pixel_eps(1, 4)}
SMOKE |= {"published_eps_grid": (0.01, 0.1), "pgd_steps": 3, "pgd_restarts": 1, "budgets": TINY}
SMOKE |= {"expensive": EXPENSIVE, "check_images": 4, "certified_per_class": 4}
SMOKE |= {"certificate_draws": 200}
SMOKE |= {"one_pixel": ((1, 10, 3, 0.5, 0.9), (1, 20, 3, 0.7, 1.0), (3, 10, 3, 0.5, 1.0))}
SMOKE |= {"one_pixel_per_class": 4, "bootstrap_draws": 200}
# any other data: a test split is drawn where there is none
OTHER = {"test_share": 0.15, "unusable_share": 0.01}

# %% tags=["start"]
from dlia_utils.run import start

run = start(
    "01_pneumonia_robustness",
    dict(full=FULL, cpu=CPU, smoke=SMOKE),
    dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES),
    by_data={"pneumonia": {}, "*": OTHER},
    own_data=2,
    allowed={name: FULL[name] for name in ("attacks", "adversarial")}
    | {"pretrained": ("phantom",)},
    trains="2 Training",
)
print(run)

# %% tags=["imports"]
from functools import partial  # noqa: I001 (one line a module keeps this cell readable)

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from scipy.special import expit
from sklearn.metrics import roc_curve

from dlia_utils import plots
from dlia_utils import calibration, files, launch, metrics, models, objectives
from dlia_utils.data import datasets
from dlia_utils import report, smoothing, train
from dlia_utils.data import split
from dlia_utils.attacks import checklist, evaluate, fgsm, normalised_eps, one_pixel, pgd
from dlia_utils.models.pixel import fast_copy
from dlia_utils.models.mobilenet import IMAGENET_STD
from dlia_utils import suite
from dlia_utils.suite import choose_under_attack, held_out
from dlia_utils.study import attack_subset, load_models, made_by, open_study, stored
from dlia_utils.study import test_opened, train_model, weights_label
from dlia_utils.units import eps_text

RESULTS = run.run_dir / "results.csv"

# %% [markdown]
# **Your model here.** One line puts any network with two logits into every table below: a function that *builds* one
# (it is trained here, like the baseline), or a network that is *trained already*. Networks expect normalised images;
# attacks think in grey levels. `models.wrap` settles that: images enter in [0, 1], the normalisation is part of the
# model, and 4/255 means four grey levels. `models.backbone` does it for any name of torchvision or timm.

# %% tags=["yours"]
# run.own["resnet18"] = lambda: models.backbone("resnet18", num_classes=2, pretrained=False)
# run.own["mine"] = models.wrap(my_trained_network, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224,
# 0.225])
MODELS = ["baseline", "lipschitz", "lipschitz_operator", "margin_gradient"]
MODELS += [*(f"distilled_T{t:g}" for t in run.temperatures), "papernot", *run.adversarial, *run.own]

# %% [markdown]
# ## 1 The data
#
# The published archive has three traps that most public notebooks fall into: a complete second copy of the
# data inside itself (`chest_xray/chest_xray`), thousands of `._*` files that look like images, and a
# validation folder of **16** images, on which a model's accuracy moves in steps of 6 %. The loader counts the
# junk and never reads an image twice.

# %%
study = open_study(run)
print(f"{len(study.cache.truncated)} files end too early but decode: they are used")
display(datasets.summary(study.dataset))
study.dataset.ignored["reason"].value_counts().rename("files not read").to_frame()

# %% [markdown]
# **The split.** The official test folder stays as it is. Validation is drawn again from train and val together:
# whole patients, classes in proportion. Patients are read from the file names (`person17_bacteria_52`,
# `IM-0115-0001`, `NORMAL2-IM-0052-0001`). Without that rule, another image of the same chest would sit on both
# sides, and the model could recognise the patient instead of the disease.
#
# The audit below also looks for byte-identical files. Read its *detail* column: the archive reuses person
# numbers between train and test, and only the numbers together with the kind of infection keep them apart.

# %%
pd.set_option("display.max_colwidth", 110)
split.audit(study.dataset)

# %% [markdown]
# **What the model sees.** Each image is decoded once to one grey channel, squashed to a square (as in the
# original study) and kept as a memory-mapped array. From here on an image is a float in [0, 1] with *one*
# channel: a radiograph is grey, so an attack that paints red and blue pixels would not be a radiograph.

# %%
labels = study.labels(study.rows("train")).cpu().numpy()
shown = np.concatenate([study.rows("train")[labels == c][:6] for c in (0, 1)])
titles = study.dataset.manifest.loc[shown, ["class_name", "patient"]].agg("\n".join, axis=1)
figure = plots.figure_samples(study.images(shown).cpu().numpy(), titles, run.caption)
report.save_figure(figure, run, "samples")
figure


# %% [markdown]
# ## 2 Training
#
# All models share one recipe (Adam; flips, small rotations, shifts and zooms, changes of exposure and sharpness,
# the same for both classes) and differ only in the loss. The best epoch is chosen by validation accuracy. A run
# that is cut off goes on from its last finished epoch. Each cell below defines one model; the last one trains them.
#
# **Baseline.** Plain cross-entropy, with both classes weighing the same although there are three pneumonias to
# each healthy chest.

# %%
def train_baseline(study):
    return train_model(study, "baseline", objectives.cross_entropy(weight=study.class_weights()))


# %% [markdown]
# **Lipschitz models.** Spectral normalisation divides every convolution and linear layer by (an estimate of) its
# largest singular value, and a penalty $\lambda\,\|\nabla_x \max_k p_k(x)\|_2^2$ with $\lambda = 0.05$ flattens the
# output around each image (gradient in the normalised units of the original study). Two remarks before you
# trust the name. The original study takes the norm of the *reshaped* kernel, a matrix `[out, in*kh*kw]`, which is not
# the norm of the convolution; `lipschitz_operator` does it properly, by power iteration on the convolution itself.
# And batch normalisation multiplies either of them right back. The table after the training shows both.

# %%
def train_lipschitz(study, name, kind):
    penalised = objectives.lipschitz(
        penalty=run.lipschitz_penalty, input_std=IMAGENET_STD, weight=study.class_weights()
    )
    return train_model(study, name, penalised, spectral=kind)


# %% [markdown]
# **A penalty on the margin.** A flat softmax can also be had by large logits: where $p = 1$ to all digits its
# gradient is zero. So `margin_gradient` penalises the gradient of the logit margin $z_{right} - z_{wrong}$ itself
# (after Drucker and LeCun, and Ross and Doshi-Velez [1711.09404](https://arxiv.org/abs/1711.09404)).

# %%
def train_margin_gradient(study):
    flat = objectives.margin_gradient(penalty=run.gradient_penalty, weight=study.class_weights())
    return train_model(study, "margin_gradient", flat)


# %% [markdown]
# **Distillation as published in the study we redo.** The teacher is the baseline; the student learns
# $\alpha\,T^2\,\mathrm{KL}(p_T^{teacher} \| p_T^{student}) + (1-\alpha)\,\mathrm{CE}$ with $\alpha = 0.9$ at $T = 35$ and
# $T = 50$. This is Hinton's knowledge distillation.

# %%
def train_distilled(study, temperature):
    teacher = load_models(study, ["baseline"])["baseline"]
    student = objectives.distillation(teacher, temperature=temperature, alpha=run.alpha)
    return train_model(study, f"distilled_T{temperature:g}", student)


# %% [markdown]
# **Distillation as Papernot defined it** ([1511.04508](https://arxiv.org/abs/1511.04508)). The difference is
# where the temperature sits: the *teacher itself* is trained at $T$, the student at the same $T$, and both are
# deployed at $T = 1$. To make probabilities sharp after division by 50, the logits must grow about fifty-fold.
# Remember this in section 6.

# %%
def train_papernot_teacher(study):
    hot_loss = objectives.cross_entropy_at(max(run.temperatures), weight=study.class_weights())
    return train_model(study, "papernot_teacher", hot_loss)


def train_papernot(study):
    teacher = load_models(study, ["papernot_teacher"])["papernot_teacher"]
    student = objectives.distillation(teacher, temperature=max(run.temperatures), alpha=1.0)
    return train_model(study, "papernot", student)


# %% [markdown]
# **Noise.** Gaussian noise on every training image, the training for randomised smoothing (Cohen et al.
# [1902.02918](https://arxiv.org/abs/1902.02918)). This network is only ever asked about *noisy* images, so its best epoch is
# chosen on noisy validation images, and it has no place among the models that read clean ones. Section 7 turns it into a
# classifier with a certificate.

# %%
def train_gaussian_noise(study):
    x, y = held_out(study)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(run.seed)).to(x.device)

    def under_noise(model):
        called = train.log_odds(model, x + run.sigma * noise) > 0
        return {"val_noisy_accuracy": float((called == (y.cpu().numpy() == 1)).mean())}

    noisy = objectives.gaussian_noise(sigma=run.sigma, weight=study.class_weights())
    return train_model(
        study, "gaussian_noise", noisy, val_metric=under_noise, monitor="val_noisy_accuracy"
    )


# %% [markdown]
# **Adversarial training.** Attack every batch first, then learn from the attacked images. The family:
#
# | name | what it learns from | paper |
# |---|---|---|
# | `pgd_at` | images under a few PGD steps, with their true labels | Madry et al. [1706.06083](https://arxiv.org/abs/1706.06083) |
# | `fast_at` | one large step from a random start; watched for catastrophic overfitting | Wong et al. [2001.03994](https://arxiv.org/abs/2001.03994) |
# | `free_at` | one backward pass that serves weights and attack at once, several times per batch | Shafahi et al. [1904.12843](https://arxiv.org/abs/1904.12843) |
# | `trades` | clean images, plus the distance between clean and attacked answers | Zhang et al. [1901.08573](https://arxiv.org/abs/1901.08573) |
# | `mart` | attacked images; those that are wrong when clean must be stable most of all | Wang et al., ICLR 2020 |
# | `hat` | as TRADES, with a helper image beyond the attacked one that keeps the border from moving too far | Rade and Moosavi-Dezfooli, ICLR 2022 |
# | `gairat` | `pgd_at`, continued with large weights for images near the border | Zhang et al. [2010.01736](https://arxiv.org/abs/2010.01736) |
#
# Their best epoch is chosen by validation accuracy *under attack*: chosen on clean images it would be the least robust one.

# %%

# %%
def train_adversarial(study, name):
    weight = study.class_weights()
    ball = {"eps": run.at_eps, "weight": weight}
    steps = {**ball, "steps": run.at_steps, "step_size": run.at_step_size}
    if name == "fast_at":
        monitor = objectives.overfitting_monitor(*held_out(study), eps=run.at_eps)
        return train_model(
            study,
            name,
            objectives.fast_adversarial(**ball),
            val_metric=monitor,
            monitor="val_pgd_accuracy",
        )
    options = choose_under_attack(study)
    if name == "pgd_at":
        objective = objectives.pgd_adversarial(**steps)
    elif name == "trades":
        objective = objectives.trades(**steps)
    elif name == "mart":
        objective = objectives.mart(**steps)
    elif name == "hat":
        objective = objectives.hat(load_models(study, ["baseline"])["baseline"], **steps)
    elif name == "free_at":
        objective = objectives.free_adversarial(**ball, replays=run.free_replays)
        options["epochs"] = run.free_epochs // run.free_replays  # as the paper counts
    elif name == "gairat":
        count = run.gairat_steps
        objective = objectives.gairat(**ball, steps=count, step_size=2 * run.at_eps / count)
        options |= {"start": "pgd_at", "epochs": run.gairat_epochs, "lr": run.lr / 4}
    else:
        raise ValueError(f"run.adversarial names {name!r}, which this cell does not know")
    return train_model(study, name, objective, **options)


# %% [markdown]
# **A model of your own** learns what the baseline learns, from the same images with the same recipe; one that is trained
# already is taken as it is.

# %%
def train_own(study, name):
    return train_model(study, name, objectives.cross_entropy(weight=study.class_weights()))


# %% [markdown]
# **Train them**, teachers before their students. `launch.each` is a loop on a laptop; with two GPUs it trains two
# models at a time, each in a process of its own with a log in the run folder. Models already trained are read back.

# %%
study = open_study(run)
print("starting weights:", weights_label(run))
jobs = {"baseline": train_baseline, "papernot_teacher": train_papernot_teacher}
jobs |= {
    "lipschitz": partial(train_lipschitz, name="lipschitz", kind="kernel"),
    "lipschitz_operator": partial(train_lipschitz, name="lipschitz_operator", kind="operator"),
    "margin_gradient": train_margin_gradient,
    "gaussian_noise": train_gaussian_noise,
}
jobs |= {name: partial(train_adversarial, name=name) for name in run.adversarial}
jobs |= {f"distilled_T{t:g}": partial(train_distilled, temperature=t) for t in run.temperatures}
jobs |= {"papernot": train_papernot} | {name: partial(train_own, name=name) for name in run.own}
later = {
    "papernot",
    "hat",
    "gairat",
    *(f"distilled_T{t:g}" for t in run.temperatures),
}  # they need another model
rows = []
for wave in (
    sorted(set(jobs) - later, key=list(jobs).index),
    [name for name in jobs if name in later],
):
    fitted = launch.each(lambda name: jobs[name](study), wave, log_dir=run.run_dir / "logs")
    rows += [
        {
            "model": name,
            "epochs": len(one.history),
            "best epoch": one.best_epoch,
            "best score": one.best_score,
            "minutes": one.seconds / 60,
        }
        for name, one in fitted.items()
    ]
pd.DataFrame(rows).round(3)

# %% [markdown]
# The curves: each loss has its own scale on the left (a distillation loss is not a cross-entropy), validation
# AUC is comparable on the right (an adversarially trained model answers clean images here, too).

# %%
histories = {
    name: pd.read_csv(run.run_dir / name / "metrics.csv")
    for name in MODELS
    if (run.run_dir / name / "metrics.csv").exists()
}
figure = plots.figure_history(histories, run.caption)
report.save_figure(figure, run, "training")
figure

# %% [markdown]
# **What spectral normalisation did to the norms.** For every convolution: the norm of the reshaped kernel beside that of
# the convolution itself, at the size of its input. Neither bounds the whole network: the gains of its batch
# normalisations come on top.

# %%
study = open_study(run)
shape, rows = (1, run.size, run.size), []
for name, model in load_models(study, ["baseline", "lipschitz", "lipschitz_operator"]).items():
    norms = models.compare_norms(model.backbone, (3, *shape[1:]))
    convolutions = norms[norms["kind"].eq("Conv2d")]
    rows.append(
        {
            "model": name,
            "largest reshaped norm": convolutions["reshaped_norm"].max(),
            "largest operator norm": convolutions["operator_norm"].max(),
            "largest ratio": convolutions["ratio"].max(),
        }
    )
pd.DataFrame(rows).round(2)

# %% [markdown]
# ## 3 The clean test
#
# The test split is opened here, after every choice has been made, and each opening is logged. The intervals
# come from a bootstrap over *patients*: two images of one child are not two independent pieces of evidence.

# %%
study = open_study(run)
trained = load_models(study, MODELS)
test_opened(study, "clean metrics of all models")
rows = study.rows("test")
labels, patients = study.labels(rows).cpu().numpy(), study.patients(rows)
scores = {name: train.log_odds(model, study.torch_set("test")) for name, model in trained.items()}
clean = pd.concat(
    report.result_rows(
        metrics.classification(labels, score, patients, threshold=0, draws=run.bootstrap_draws),
        run,
        model=name,
    )
    for name, score in scores.items()
)
report.update_results(clean, RESULTS)
table = clean.assign(cell=[report.with_interval(row) for _, row in clean.iterrows()])
table.pivot(index="model", columns="metric", values="cell").loc[
    MODELS, list(dict.fromkeys(table.metric))
]

# %% [markdown]
# Precision, recall and F1 are macro averages over both classes, as in the original study. Sensitivity is the
# share of pneumonias found; specificity the share of healthy chests left alone. Images are ranked by the log-odds
# $z_1 - z_0$, not by the probability: above a difference of 37 that is 1 to all digits, and a model with large logits
# would lose its ranking, and so its AUC, to rounding.
#
# Does a defence cost AUC? DeLong's test, on the same images and by patient; p with Holm's adjustment.

# %%
predictions = study.dataset.manifest.loc[rows, ["path", "label"]].assign(
    **{n: expit(s) for n, s in scores.items()}
)
files.write_csv(predictions, run.run_dir / "predictions.csv")
tests = {
    name: metrics.delong_test(labels, scores[name], scores["baseline"], patients)
    for name in MODELS[1:]
}
tests = pd.DataFrame(tests).T.rename(columns={"value": "AUC minus the baseline's"})
tests["p (Holm)"] = metrics.holm(tests["p"])
files.write_csv(tests.rename_axis("model").reset_index(), run.run_dir / "auc_tests.csv")
display(tests[["AUC minus the baseline's", "ci_low", "ci_high", "p (Holm)"]].astype(float).round(4))
figure = plots.figure_roc(labels, scores, run.caption)
report.save_figure(figure, run, "roc")
figure

# %%
predicted = {name: (score > 0).astype(int) for name, score in scores.items()}
figure = plots.figure_confusion(labels, predicted, study.dataset.classes, run.caption)
report.save_figure(figure, run, "confusion")
figure


# %% [markdown]
# **Are the probabilities honest?** A model that says 0.9 should be right nine times in ten. The expected calibration
# error (ECE, ten bins of equal mass) is the mean distance from that; `if_calibrated` is what a perfect model would score
# by chance on so few images, so only an ECE well above it means anything. One temperature, fitted on the *validation*
# images ([1706.04599](https://arxiv.org/abs/1706.04599)), divides the logits; it cannot change an answer or an AUC.
#
# The same loop takes the **sensitivity at a specificity of 0.9** (the second table below).

# %%
def roc_point(labels, score, weights=None, specificity=0.9):
    """The highest sensitivity with that specificity, and its threshold (positive is above)."""
    if weights is not None and not weights[labels == 0].any():
        return np.nan, np.nan
    false_alarm, hit, cut = roc_curve(labels, score, sample_weight=weights, drop_intermediate=False)
    place = np.flatnonzero(1 - false_alarm >= specificity - 1e-9)[-1]
    return hit[place], cut[place + 1]


def at_specificity(labels, score, patients, threshold):
    """What a threshold from validation gives, and the best that the test ROC itself has."""
    options = {"draws": run.bootstrap_draws}
    fixed = metrics.classification(labels, score, patients, threshold=threshold, **options)
    fixed = fixed[fixed["metric"].isin(["sensitivity", "specificity"])]
    on_roc = metrics.bootstrap(
        lambda weights: np.array([roc_point(labels, score, w)[0] for w in weights]),
        patients,
        **options,
    )
    table = pd.concat([fixed.assign(metric=fixed["metric"] + "_at_0.9_val_threshold"), on_roc])
    return table.fillna({"metric": "sensitivity_at_0.9_test_roc"})


# %%
study = open_study(run)
rows = study.rows("test")
labels, patients = study.labels(rows).cpu().numpy(), study.patients(rows)
val_labels = study.labels(study.rows("val")).cpu().numpy()
test_opened(study, "calibration")
calibrated, table, fixed = {}, [], []
for name, model in load_models(study, MODELS).items():
    on_val, on_test = (train.log_odds(model, study.torch_set(part)) for part in ("val", "test"))
    temperature = calibration.fit_temperature(
        np.stack([np.zeros_like(on_val), on_val], axis=1), val_labels
    )
    calibrated[name] = expit(on_test / temperature)
    for when, p in (("clean", expit(on_test)), ("clean, temperature", calibrated[name])):
        found = calibration.summary(labels, p, patients, draws=run.bootstrap_draws)
        table.append(found.assign(model=name, attack=when, temperature=temperature))
    found = at_specificity(labels, on_test, patients, roc_point(val_labels, on_val)[1])
    fixed.append(report.result_rows(found, run, model=name))
fixed, table = pd.concat(fixed), pd.concat(table)
report.update_results(fixed, RESULTS)
report.update_results(report.result_rows(table.filter(report.RESULT_COLUMNS), run), RESULTS)
shown = table[table.metric.isin(["ece", "brier"])].assign(
    cell=lambda t: [report.with_interval(row) for _, row in t.iterrows()]
)
shown["what"] = shown.metric + shown.attack.str.removeprefix("clean").str.replace(",", " after")
alone = table[table.metric.eq("ece") & table.attack.eq("clean")].set_index("model")[
    ["temperature", "if_calibrated"]
]
alone.round(3).join(shown.pivot(index="model", columns="what", values="cell")).loc[MODELS]

# %% [markdown]
# **Sensitivity at a specificity of 0.9.** `val_threshold`: the threshold that gives it on validation images, used on these.
# The specificity that really comes of it stands beside it; here the two splits differ, and it shows. `test_roc` chooses
# its threshold on the very images it is scored on: an upper reference, nothing that could be had in use.

# %%
fixed["cell"] = [report.with_interval(row) for _, row in fixed.iterrows()]
fixed.pivot(index="model", columns="metric", values="cell").loc[
    MODELS, list(dict.fromkeys(fixed.metric))
]

# %% [markdown]
# What the calibrated probabilities are worth, bin by bin: on the dotted line, a model that says 0.9 is right nine times
# in ten. Mind the share of pneumonias: it is that of this test split, not of a hospital.

# %%
some = {name: calibrated[name] for name in ("baseline", "papernot", run.adversarial[0])}
draws = min(500, run.bootstrap_draws)
curves = {
    name: calibration.reliability(labels, p, patients, draws=draws) for name, p in some.items()
}
figure = plots.figure_reliability(curves, run.caption)
report.save_figure(figure, run, "reliability")
figure


# %% [markdown]
# ## 4 FGSM in the units of the original study
#
# FGSM moves every pixel one step along the sign of the loss gradient:
# $x' = x + \varepsilon\,\mathrm{sign}(\nabla_x J)$. The original study added $\varepsilon$ to the *normalised*
# image. One normalised unit is $\sigma_c \approx 0.225$ of the pixel range and differs between the colour
# channels, so its 0.03 is about 1.7/255, and the attacked image is slightly tinted. We repeat it exactly (three
# channels, per-channel eps) so the published numbers can be compared, and then leave these units for good.

# %%
def fgsm_normalised(model, study, rows):
    std = model.std.flatten().cpu()
    tables = []
    for eps in run.published_eps_grid:
        for chunk in np.array_split(rows, -(-len(rows) // run.attack_batch)):
            x, y = study.images(chunk).expand(-1, 3, -1, -1), study.labels(chunk)
            result = fgsm(model, x, y, eps=normalised_eps(eps, std).to(x.device))
            tables.append(
                pd.DataFrame({"eps": eps, "image": chunk, "fooled": result.success.cpu()})
            )
    return pd.concat(tables).assign(attack="fgsm_normalised")


# %%
study = open_study(run)
trained, rows = load_models(study, MODELS), study.rows("test")
test_opened(study, "FGSM in normalised units")
for name, model in trained.items():
    per_image = stored(
        study,
        f"fgsm_normalised_{name}",
        lambda m=model: fgsm_normalised(m, study, rows),
        model=name,
        uses=["published_eps_grid"],
    )
    accuracy = report.accuracy_rows(per_image, study, model=name, eps_unit="normalised")
    results = report.update_results(accuracy, RESULTS)
figure = plots.figure_accuracy_vs_eps(
    results,
    run.caption,
    attack="fgsm_normalised",
    unit="normalised",
    note="FGSM as in the original study",
)
report.save_figure(figure, run, "fgsm_normalised")
figure


# %% [markdown]
# A curve that stays up here is *not yet* a robust model: FGSM takes one step, trusts the gradient of the
# cross-entropy, and both can be fooled themselves.

# %% [markdown]
# ## 5 The suite
#
# From here on eps is in pixel units, k/255: the number of grey levels (of 255) any pixel may move. The attacker
# knows the model completely. Nine attacks, on every image of the test split that the model gets right:
#
# | attack | what it does | why it is here |
# |---|---|---|
# | noise | random points and corners of the eps box | the control: a model that falls here is simply bad |
# | FGSM | one signed step | the classic |
# | PGD, cross-entropy | many small steps from a random start | the standard |
# | PGD, margin | the same on $z_{wrong} - z_{right}$ | cannot be blinded by a saturated softmax |
# | APGD, two losses | PGD that halves its step when it stalls ([2003.01690](https://arxiv.org/abs/2003.01690)) | no step size to get wrong |
# | DeepFool | follows the linearised border | finds the *smallest* change: run once, it counts at every eps |
# | FMN | the smallest change by descent ([2102.12827](https://arxiv.org/abs/2102.12827)) | as DeepFool, mostly stronger |
# | Square | random squares, answers only ([1912.00049](https://arxiv.org/abs/1912.00049)) | sees no gradient, so no gradient can be hidden from it |
#
# `evaluate.robust` is the one call. An image counts as right only if *no* attack fooled it at this or any smaller
# eps: the worst case per image, which is no higher than the best single attack. Images that are wrong before any attack
# count as fooled. The expensive attacks run only at the eps that `expensive` in the settings names, and the list of
# attacks is `attacks` there: shorten or extend it. What is finished lies in the run folder.

# %%
def evaluated(name):
    return suite.attack(open_study(run), name).cost.assign(model=name)


# %%
study = open_study(run)
test_opened(study, "the suite of attacks in pixel units")
cost = pd.concat(launch.each(evaluated, MODELS, log_dir=run.run_dir / "logs").values())
files.write_csv(cost, run.run_dir / "suite_cost.csv")
for name in MODELS:
    per_image = stored(study, f"robust_{name}", model=name, section="5 The suite")
    rows = [
        report.accuracy_rows(per_image, study, model=name),
        report.direction_rows(per_image, study, model=name, eps=run.headline_eps),
    ]
    results = report.update_results(pd.concat(rows), RESULTS)
worst = results[results.attack.isin(["clean", "worst"])]
report.results_table(worst)

# %% [markdown]
# The table gives worst-case accuracy with its 95 % interval; the figure shows the same for all eps. A model
# below the dashed share of the larger class would do better by always answering "pneumonia".

# %%
figure = plots.figure_accuracy_vs_eps(
    results, run.caption, attack="worst", note="Worst case over the suite"
)
majority = np.bincount(study.labels(study.rows("test")).cpu()).max() / len(study.rows("test"))
figure.axes[0].axhline(majority, color="0.5", ls="--", lw=1)
report.save_figure(figure, run, "worst_case")
figure

# %% [markdown]
# Each attack by itself at the headline eps, all over the same images. Read across a row: noise should hurt least, the
# iterative attacks at least as much as FGSM, and the worst case lies below them all. Where it is otherwise, something is
# wrong with the attack, not right with the model.

# %%
near = results[
    np.isclose(results.eps, run.headline_eps)
    & results.eps_unit.eq("pixel")
    & results.metric.eq("accuracy")
]
near.pivot(index="model", columns="attack", values="value").reindex(
    MODELS, columns=[*run.attacks, "worst"]
).round(3)

# %% [markdown]
# **In which direction does it fall?** A missed pneumonia and a false alarm are not the same mistake: the worst case, split
# into the share of pneumonias still found (sensitivity) and of healthy chests still left alone (specificity).

# %%
directions = results[
    results.attack.eq("worst") & results.metric.isin(["sensitivity", "specificity"])
]
directions = directions.assign(cell=[report.with_interval(row) for _, row in directions.iterrows()])
display(directions.pivot(index="model", columns="metric", values="cell").reindex(MODELS))
cost = pd.read_csv(run.run_dir / "suite_cost.csv")
cost.groupby("model", sort=False)[["forwards", "backwards", "seconds"]].sum().astype(int)

# %% [markdown]
# **One model on one page.** This is what the call gives for any two-class model in [0, 1]: the threat model, a row per
# eps, the cost, and a figure of who fooled the images first. (`checklist.page(found, checklist.report(found))` adds the
# check list of the next section.)

# %%
study = open_study(run)
found = suite.attack(study, (run.adversarial or MODELS)[0])
print(checklist.page(found))
figure = plots.figure_worst_case(found, run.caption)
report.save_figure(figure, run, "one_page")
figure

# %% [markdown]
# ## 6 Is it to be believed?
#
# An attack by gradient needs a gradient. If a model's logits are hundreds apart, the softmax is exactly 0 or 1
# in 32-bit arithmetic, the cross-entropy's gradient is exactly zero, and FGSM and PGD stand still: the model
# *looks* robust. The margin $z_{wrong} - z_{right}$ has the same direction and never saturates. So compare the
# two losses, and count the zeros.

# %%
study = open_study(run)
trained, rows = load_models(study, MODELS), study.rows("test")
test_opened(study, "share of zero gradients")
images, labels = study.images(rows), study.labels(rows)
shares = {}
for name, model in trained.items():
    table = stored(
        study,
        f"zero_gradients_{name}",
        lambda m=model: pd.DataFrame(
            {
                "share": [
                    evaluate.zero_gradient_share(m, images, labels, batch_size=run.attack_batch)
                ]
            }
        ),
        model=name,
        uses=["attack_batch"],
    )
    shares[name] = table["share"].item()
results = report.update_results(report.zero_gradient_rows(shares, study), RESULTS)
masking = report.masking_table(results, eps=run.headline_eps)
masking.round(3)

# %%
figure = plots.figure_masking(masking, run.caption, eps=run.headline_eps)
report.save_figure(figure, run, "masking")
figure

# %% [markdown]
# **The check list** of Carlini et al. ([1902.06705](https://arxiv.org/abs/1902.06705)), as checks that can fail. A WARN
# is a finding about the *evaluation* of that model: do not believe its robust accuracy before you know why. Below the
# overview stand the warnings with their numbers.

# %%
checks = {
    name: stored(study, f"checks_{name}", model=name, section="5 The suite") for name in MODELS
}
checks = pd.concat(checks, names=["model"]).reset_index("model").reset_index(drop=True)
order = list(dict.fromkeys(checks["check"]))
display(checks.pivot(index="check", columns="model", values="verdict").loc[order, MODELS])
with pd.option_context("display.max_colwidth", 300):
    display(
        checks.loc[checks["verdict"].eq("WARN"), ["model", "check", "value"]].reset_index(drop=True)
    )

# %% [markdown]
# ## 7 A certificate
#
# Everything above shows what *our* attacks could not do. Randomised smoothing proves something about all attacks: ask the
# noise-trained model about thousands of noisy copies of an image and take the majority. If the majority is large, no change
# shorter than a radius $r$ (in L2: the length of the whole change) can turn it, with probability 1 - 0.001. Mind the unit:
# moving *every* pixel by 4/255 has a length of $\frac{4}{255}\sqrt{S \cdot S}$, far outside such a radius. The
# certificate and the table of section 5 answer different questions.

# %%
study = open_study(run)
rows = attack_subset(study, run.certified_per_class)
test_opened(study, f"a certificate for {len(rows)} images")
model = load_models(study, ["gaussian_noise"])["gaussian_noise"]
certified = stored(
    study,
    "certificate_gaussian_noise",
    lambda: smoothing.certify(
        fast_copy(model),
        study.images(rows),
        study.labels(rows),
        sigma=run.sigma,
        n=run.certificate_draws,
        ids=rows,
        seed=run.seed,
    ),
    model="gaussian_noise",
    uses=["certified_per_class", "sigma", "certificate_draws", "seed"],
)
radii = np.array([0, 0.5, 1, 1.5, 2, 2.4]) * run.sigma  # 1,000 draws can show 2.46 sigma at most
table = smoothing.certified_accuracy(
    certified, radii, study.patients(rows), draws=run.bootstrap_draws
)
table = table.rename(columns={"radius": "eps"}).filter(report.RESULT_COLUMNS)
table = report.result_rows(
    table, run, model="gaussian_noise, smoothed", attack="any, certified", eps_unit="L2 length"
)
report.update_results(table, RESULTS)
whole = run.headline_eps * run.size
print(
    f"every pixel moved by {eps_text(run.headline_eps)} is a change of L2 length {whole:.2f}; "
    f"no answer for {(certified['predicted'] == smoothing.ABSTAIN).mean():.0%} of the images"
)
pd.DataFrame(
    {
        "L2 radius": table["eps"].round(3),
        "certified accuracy": [report.with_interval(r) for _, r in table.iterrows()],
        "images": table["n"],
    }
)


# %% [markdown]
# ## 8 One-Pixel
#
# A different attacker: no gradient, only the model's answers, and only one pixel (or three) may change, but by
# as much as it likes. Differential evolution ([1710.08864](https://arxiv.org/abs/1710.08864)) breeds a population
# of (row, column, red, green, blue) candidates. All images' candidates run through the model together, and an
# image leaves as soon as it is fooled. The two models and three settings are those of the original study; they cost
# up to 24,200 queries an image, so they run on a fixed, class-balanced sample of the test split.

# %%
def attack_one_pixel(model, study, rows, setting):
    pixels, population, iterations, f, cr = setting
    x, y = study.images(rows).expand(-1, 3, -1, -1), study.labels(rows)
    result = one_pixel(
        fast_copy(model),
        x,
        y,
        pixels=pixels,
        population=population,
        iterations=iterations,
        f=f,
        cr=cr,
        seed=[(run.seed, row) for row in rows],
    )
    before, after = (train.predict(model, images)[0][:, 1] for images in (x, result.x_adv))
    return pd.DataFrame(
        {
            "image": rows,
            "label": y.cpu(),
            "clean_probability": before,
            "probability": after,
            "queries": result.queries.cpu(),
        }
    )


# %%
def one_pixel_rows(table, study, name, setting):
    """Result rows of one setting, with the clean accuracy of the same sample beside them."""
    patients = study.patients(table["image"].to_numpy())
    found = metrics.classification(
        table["label"], table["probability"], patients, draws=run.bootstrap_draws
    )
    right = (table["clean_probability"] > 0.5).eq(table["label"] == 1)
    beside = {"clean_accuracy": right.mean(), "queries_mean": table["queries"].mean()}
    beside = pd.DataFrame({"metric": beside.keys(), "value": beside.values(), "n": len(table)})
    pixels, population, iterations, f, cr = setting
    named = f"one_pixel k={pixels} pop={population} it={iterations} F={f:g} CR={cr:g}"
    labels = {"model": name, "attack": named, "eps": 1.0, "eps_unit": "pixels changed fully"}
    return report.result_rows(pd.concat([found, beside]), study.run, **labels)


# %%
study = open_study(run)
trained, rows = (
    load_models(study, ["baseline", "lipschitz"]),
    attack_subset(study, run.one_pixel_per_class),
)
test_opened(study, f"One-Pixel on {len(rows)} images")
for name, model in trained.items():
    for number, setting in enumerate(run.one_pixel, start=1):
        table = stored(
            study,
            f"one_pixel_{number}_{name}",
            lambda m=model, s=setting: attack_one_pixel(m, study, rows, s),
            model=name,
            uses=["one_pixel", "one_pixel_per_class", "seed"],
        )
        outcome = one_pixel_rows(table, study, name, setting)
        results = report.update_results(outcome, RESULTS)

# %% [markdown]
# Accuracy, macro precision, recall and F1 under each setting, as the original study prints them.

# %%
shown = ["clean_accuracy", "accuracy", "precision", "recall", "f1", "queries_mean"]
own = results[results.attack.str.startswith("one_pixel") & results.metric.isin(shown)]
cells = [report.with_interval(row) for _, row in own.iterrows()]
macro = own.metric.isin(shown[2:5])
own = own.assign(cell=np.where(macro, own["value"].map("{:.3f}".format), cells))
own.pivot_table(
    index=["attack", "model", "n"], columns="metric", values="cell", aggfunc="first", sort=False
)[shown]

# %% [markdown]
# Compare with *clean accuracy*, which is that of the same sample, not of the whole test split. The original study
# saved its attacked images as JPEG before measuring, which wipes out a changed pixel; here the image goes to the
# model as the attack made it.

# %% [markdown]
# ## Look at an attack
#
# The attacked image at the headline eps beside the clean one, and the difference, amplified to the full colour
# range. Side by side the images look the same; the answers above them do not. Compare the two patterns: which model
# forces the attack to draw something that looks like anatomy?

# %%
study = open_study(run)
trained = load_models(study, ["baseline", (run.adversarial or MODELS)[0]])
rows = attack_subset(study, 1)
x, y = study.images(rows), study.labels(rows)
attacked, captions = {}, [{"clean": study.dataset.classes[label]} for label in y.tolist()]
for name, model in trained.items():
    adversarial = pgd(
        model,
        x,
        y,
        eps=run.headline_eps,
        steps=run.pgd_steps,
        loss="margin",
        stop_when_fooled=False,
        seed=[(0, row) for row in rows],
    ).x_adv
    attacked[name] = adversarial.cpu().numpy()
    for caption, p in zip(captions, train.predict(model, adversarial)[0], strict=True):
        caption[name] = f"{name}: {study.dataset.classes[p.argmax()]} {p.max():.2f}"
figure = plots.figure_adversarial(x.cpu().numpy(), attacked, captions, run.caption)
report.save_figure(figure, run, "adversarial")
figure

# %% [markdown]
# ## 9 Verdict
#
# Every model against the baseline on the *same* images, clean and in the worst case at the headline eps: McNemar's exact
# test by patient, with Holm's adjustment for the number of comparisons.

# %%
study = open_study(run)
per_image = {
    name: stored(study, f"robust_{name}", model=name, section="5 The suite") for name in MODELS
}
paired = report.paired_tests(per_image, study, eps=run.headline_eps, reference="baseline")
files.write_csv(paired, run.run_dir / "paired_tests.csv")
paired.round(4)

# %% [markdown]
# The sentences below are written by code from this run's numbers, so that they cannot claim more than the run
# shows.

# %%
results = pd.read_csv(made_by(run, "results.csv", "5 The suite"))
masking = report.masking_table(results, eps=run.headline_eps)
Markdown(report.verdict(results, masking, paired, run))

# %% [markdown]
# ## Results and files
#
# The headline table, and everything this run wrote. Copy `results.csv` rows into your own comparison: each row
# says model, attack, eps, interval, n, seed, size, epochs, profile, data and hardware.

# %%
headline = pd.read_csv(made_by(run, "results.csv", "5 The suite"))
keep = headline.attack.isin(["clean", "worst"]) & (
    headline.eps.eq(0) | np.isclose(headline.eps, run.headline_eps)
)
display(report.results_table(headline[keep]))
written = sorted(
    p.relative_to(run.run_dir).as_posix() for p in run.run_dir.rglob("*") if p.is_file()
)
print(f"{len(written)} files in {run.run_dir.parent.name}/{run.run_dir.name}:")
print("\n".join(name for name in written if not name.startswith(("tables/", "suite/"))))
