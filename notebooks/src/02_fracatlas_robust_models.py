# %% [markdown]
# # 02 FracAtlas: do robust models transfer to fractures, and where do they look?
#
# Eight networks that withstand attacks on tiny colour photographs (CIFAR-10) are fitted with a new last layer and asked
# about broken bones. Do they keep their robustness? And does a robust model look at the fracture, where a fragile one
# looks anywhere? A study that asked this published a table of promising numbers. This notebook repeats it without the
# mistakes that made the table, and adds the comparison it lacked: one MobileNetV2 trained plainly and trained against
# attacks.
#
# **What you will learn.**
#
# - how a careless augmentation writes the label into the image, and how five lines of code find out;
# - how to load published robust models so that not one weight is silently random;
# - what a robust head on fragile features is worth;
# - how to score heat maps (saliency, integrated gradients, DeepLIFT, occlusion, Grad-CAM) against the fracture that
#   radiologists marked, beside maps that know nothing.
#
# **Before you start.** Notebook 01 explains the attacks and the worst case per image. You know what fine-tuning is.
#
# **Time.** Reading: an hour. Running: smoke (tiny networks, 48 px) about 90 seconds on a laptop; cpu at most four
# hours, without the eight large networks; full needs a GPU and the internet: at most 8.5 hours on Kaggle's two T4, both
# by the plan below (not seen yet).
#
# <!-- contents -->
#
# The outputs stored in this file are from the smoke profile on *synthetic* images with tiny networks that learnt from
# other synthetic images: they show what you will see, and that the code works. What came out on real radiographs stands in
# section 8.
#
# *For research and teaching. Not a medical device.*

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"  # "smoke" (two minutes), "cpu" (laptop, up to four hours), "full" (GPU), "auto"
DATA_DIR = ""  # empty: find the data set; else the folder that holds FracAtlas
RUN_NAME = ""  # empty: profile and kind of data
RESUME = True  # True: go on where a run stopped; False: anew; "force": under other settings
CHANGES = {}  # settings of your own, whatever the profile, such as {"epochs": 5}

# %% [markdown]
# **The settings.** FULL is the whole study; CPU and SMOKE are what is smaller on a laptop and in a first look. To change
# one, whatever the profile, write it into `CHANGES` above: `CHANGES = {"epochs": 5}`. A typo is told, a changed setting
# is starred below, and the run gets a folder of its own, which takes over whatever the change does not touch.

# %% tags=["settings"]
from dlia_utils.attacks import evaluate
from dlia_utils.units import pixel_eps

# The data; fit "pad" keeps the aspect, unusable_share allows for files that are badly cut short
FULL = {"dataset": "fracatlas", "seed": 0, "size": 224, "fit": "pad", "per_class": None}
FULL |= {"unusable_share": 0.01, "val_share": 0.1, "test_share": 0.1}
# MobileNetV2, and the recipe of every training; balance "weights" of the classes, or "sampling"
FULL |= {"width": 1.0, "stages": 7, "pretrained": True, "epochs": 30, "batch_size": 32, "lr": 1e-3}
FULL |= {"schedule": "onecycle", "patience": None, "max_minutes": 90.0, "num_workers": 2}
FULL |= {"hours": None}  # of a session; None is 11 of Kaggle's 12, and no limit elsewhere
FULL |= {"balance": "weights"}
# Adversarial training; at_start: what pgd_at goes on from ("": the starting weights); and the
# head ("linear", or "mlp", the original study's)
FULL |= {"at_eps": 4 / 255, "at_steps": 7, "at_step_size": 1 / 255, "trades_beta": 6.0}
FULL |= {"at_start": "standard", "head": "linear"}
# Robust models of the literature: weights "public" are downloaded; they were trained on 32 px
ZOO = ("chen2024_wrn_34_20", "gairat_wrn_28_10", "huang2021_wrn_34_r", "hat_wrn_34_10")
ZOO += ("rebuffi2021_wrn_70_16", "standard_wrn_28_10", "meansparse_wrn_94_16", "ra_wrn_70_16")
FULL |= {"zoo": ZOO, "zoo_weights": "public", "zoo_width": 1.0, "zoo_size": 64}
FULL |= {"zoo_epochs": 30, "zoo_lr": 1e-3}
# the widths that MeanSparse chooses from; maps of the first so many models (None: all)
FULL |= {"zoo_alphas": (0.0, 0.15, 0.3), "zoo_maps": 4}

# %% tags=["settings"]
# The attacks: add or leave out; their budgets; the eps at which expensive ones run, if not at all;
# attack_batch None: as many images at once as fit in memory
FULL |= {"attacks": evaluate.SUITE, "eps_grid": pixel_eps(0.5, 1, 2, 4, 8), "headline_eps": 4 / 255}
FULL |= {"pgd_steps": 10, "pgd_restarts": 1, "attack_batch": None}
FULL |= {"budgets": {"square": {"steps": 2000}}}
FULL |= {"expensive": {"square": pixel_eps(4)}, "check_images": 100}
# full_at: the eps at which every attack meets every image; most: images that one meets at most
FULL |= {"full_at": 4 / 255, "most": {"square": 200}}
# The maps: of so many test images with a finding
FULL |= {"maps": 72, "occlusion_window": 28, "integrated_steps": 32, "bootstrap_draws": 2000}
# `standard` and `pgd_at` are trained again under each of these seeds, for their maps in section 7
FULL |= {"more_seeds": ()}

# %% tags=["settings"]
# What is cut so that `full` fits a session (9 hours of two T4, by the plan below; it was up to 79):
# the large networks have up to 800 times the multiplications of a MobileNetV2 at 224 px. They meet
# five attacks at two eps instead of the whole suite; MeanSparse chooses from 3 widths instead of 7;
# and maps are drawn of four of them (zoo_maps).
FULL |= {"zoo_suite": {"eps_grid": pixel_eps(1, 4), "full_at": 4 / 255, "check_images": 20}}
FULL["zoo_suite"] |= {"attacks": ("fgsm", "pgd_ce", "pgd_margin", "apgd_margin", "square")}
FULL["zoo_suite"] |= {"budgets": {"apgd_margin": {"steps": 20}, "square": {"steps": 100}}}
FULL["zoo_suite"] |= {"expensive": dict.fromkeys(("apgd_margin", "square"), pixel_eps(4))}
FULL["zoo_suite"] |= {"most": {"square": 50}}

# %% tags=["settings"]
EXPENSIVE = dict.fromkeys(("apgd_ce", "apgd_margin", "square"), pixel_eps(4))
SHORT = {name: {"steps": 30} for name in ("apgd_ce", "apgd_margin", "fmn")}
SHORT |= {"square": {"steps": 200}}
CPU = {"size": 160, "epochs": 10, "num_workers": 0, "at_eps": 2 / 255, "at_steps": 2}
CPU |= {"at_step_size": 1.4 / 255, "occlusion_window": 20, "integrated_steps": 16}
CPU |= {"zoo": ()}  # the large networks are no work for a laptop
CPU |= {"budgets": SHORT, "expensive": EXPENSIVE, "check_images": 100}

# %% tags=["settings"]
TINY = {name: {"steps": 4} for name in ("apgd_ce", "apgd_margin", "deepfool", "fmn")}
TINY |= {"noise": {"draws": 4}, "square": {"steps": 6}}
SMOKE = {"size": 48, "per_class": 100, "val_share": 0.15, "test_share": 0.2, "width": 0.5}
SMOKE |= {"stages": 3, "pretrained": "phantom", "epochs": 20, "batch_size": 16, "lr": 1e-2}
SMOKE |= {"num_workers": 0, "max_minutes": None}
SMOKE |= {"at_eps": 3 / 255, "at_steps": 2, "at_step_size": 2.1 / 255, "at_start": ""}
ONE_EACH = ("huang2021_wrn_34_r", "meansparse_wrn_94_16")
SMOKE |= {"zoo": ONE_EACH, "zoo_maps": 1, "zoo_weights": "phantom", "zoo_width": 1 / 40}
SMOKE |= {"zoo_size": 32, "zoo_epochs": 60, "zoo_lr": 2e-2, "zoo_alphas": (0.0, 0.2)}
SMOKE |= {"eps_grid": pixel_eps(1, 4), "pgd_steps": 3, "budgets": TINY, "expensive": EXPENSIVE}
SMOKE |= {"most": {"square": 20}, "zoo_suite": {"attacks": FULL["zoo_suite"]["attacks"]}}
SMOKE |= {"check_images": 4, "maps": 5, "occlusion_window": 8, "integrated_steps": 8}
SMOKE |= {"bootstrap_draws": 200}

# %% tags=["start"]
from dlia_utils.run import start

run = start(
    "02_fracatlas_robust_models",
    dict(full=FULL, cpu=CPU, smoke=SMOKE),
    dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES),
    trains="2 Training MobileNetV2, three ways",
    allowed={"attacks": evaluate.LINF, "zoo": ZOO, "pretrained": ("phantom",)},
)
print(run)

# %% tags=["imports"]
from dataclasses import replace
from functools import cache, partial

import cv2
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from scipy.special import expit
from sklearn.metrics import classification_report, roc_auc_score

from dlia_utils import files, launch, metrics, models, objectives, plan, plots, report, suite
from dlia_utils import train
from dlia_utils.data import datasets, explore, split
from dlia_utils.explain import figures, localisation
from dlia_utils.explain.attribution import explain
from dlia_utils.explain.base import REFERENCES
from dlia_utils.models import robust
from dlia_utils.study import build_model, load_models, made_by, open_study, stored, test_opened
from dlia_utils.study import train_head, train_model, trained, weights_label
from dlia_utils.units import eps_text

# %% [markdown]
# **What the sections share.** The robust models of the literature take images of another size, so each has a study (data,
# split, decoded images) of its own. A training under another seed keeps the split, in a folder of its own.

# %% tags=["yours"]
MODELS = ["standard", "pgd_at", "trades", "linear_probe", "robust_probe"]
RESULTS = run.run_dir / "results.csv"


def study_of(name, seed=run.seed):
    """The images as the model `name` takes them; another `seed` is one for trainings alone."""
    study = open_study(run)
    if seed != run.seed:
        own = replace(run.variant(seed=seed), run_dir=run.run_dir / f"seed{seed}")
        return replace(study, run=own)
    return study if name in MODELS else suite.zoo_study(study)


# %% [markdown]
# **What this will cost.** Before hours are spent: each phase with the passes of images that the settings ask for, counted
# from these alone, and the time that they take here, measured on a few random batches and, for the trainings, on images
# read and augmented. *At most* counts an attack as if it fooled nobody, and a training as if it never stopped early. Left
# out are figures of a few images, models of your own, and what the CPU does with maps and tables. A run that has a
# budget (`hours`; on Kaggle 11 of the session's 12) ends between two phases or epochs before it is cut off, and goes on
# in the next session. `python -m dlia_utils plan --nb 02 --profile full --device t4` tells the same of Kaggle's GPUs
# beforehand. The cells that count are folded.

# %% tags=["plan"]
def planned_maps(name, size, images):
    """Passes of all maps of so many images: at most, with what sees that a model is steady."""
    steps, window = run.integrated_steps, max(4, run.occlusion_window * size // run.size)
    places = 1 + -(-(size - window) // max(1, window // 2))
    once = {"saliency": (2, 1), "integrated_gradients": (steps + 3, steps), "deeplift": (5, 2)}
    once |= {"occlusion": (places**2 + 2, 0), "gradcam": (1, 1)}
    forwards, backwards = images * np.array([*once.values()]).sum(0)
    told = dict(settings="maps occlusion_window zoo_maps", exact=False)
    return plan.Phase("maps", name, images, int(forwards) + 80, int(backwards), **told)


# %% tags=["plan"]
study, net = open_study(run), "MobileNetV2"
networks, phases, sizes = suite.zoo_plan(study)
how = dict(batch=run.batch_size, val=sizes["val"], exact=run.patience is None)
how |= dict(settings="epochs at_steps size")
attacked = how | dict(steps=run.at_steps, judge=suite.judging(sizes["val"], steps=run.pgd_steps))
given, shorter = ("trainings", net, sizes["train"]), max(1, run.epochs // 3)
told = dict(objective="pgd_adversarial") | attacked
for seed in (run.seed, *run.more_seeds):
    plain = dict(objective="cross_entropy", job=f"standard {seed}")
    phases += plan.training(*given, run.epochs, **plain, **how)
    phases += plan.training(*given, run.epochs, job=f"pgd_at {seed}", **told)
phases += plan.training(*given, shorter, job="robust_probe", **told)
phases += plan.training(*given, run.epochs, job="trades", **attacked | dict(objective="trades"))
seen = sizes["train"] + sizes["val"]  # the features of linear_probe, once
phases.append(plan.Phase("new heads", net, seen, seen, job="linear_probe"))

# %% tags=["plan"]
phases += suite.phases(run, MODELS, sizes["test"], net)
phases += suite.phases(run.variant(**suite.zoo_settings(run)), run.zoo, sizes["test"])
phases.append(plan.Phase("clean images", net, sizes["test"], len(MODELS) * sizes["test"]))
phases += [plan.Phase("clean images", name, sizes["test"], sizes["test"]) for name in run.zoo]
looked = [(net, run.size)] * (3 + 2 * len(run.more_seeds))
looked += [(name, run.zoo_size) for name in run.zoo[: run.zoo_maps]]
phases += [planned_maps(name, size, min(run.maps, sizes["test"])) for name, size in looked]
lost = planned_maps(net, run.size, 8 * 7)  # seven times of eight images, by three of the methods
phases.append(replace(lost, name="maps of lost weights", images=8))
loader = study.torch_set("train", augmented=True)

# %%
prices = plan.measured(networks, run.device, loader)
cost = plan.table(networks, phases, prices, gpus=torch.cuda.device_count() or 1)
print(plan.advice(cost, run.budget))
report.show(cost, digits=3)

# %% [markdown]
# ## 1 The data
#
# FracAtlas (Abedeen et al., *FracAtlas: A Dataset for Fracture Classification, Localization and Segmentation of
# Musculoskeletal Radiographs*, 2023) holds 4,083 images of hands, legs, hips and shoulders, 717 of them with a fracture
# that radiologists boxed and outlined. Its flaws: some JPEG files end too early (they are used if the loss is small, left
# out by name if a quarter of the image is missing), one image contradicts itself (flag "not fractured", but a fracture
# box), patients are not named, and a good many images occur twice. The published split covers only the fractured images,
# so one split is drawn here for *all* models: 80 / 10 / 10, stratified by class and body part, with byte-identical images
# and near-duplicates (perceptual hash, confirmed by correlation) always on one side.

# %%
study = open_study(run)
print(study.dataset.split_rule)
display(report.show(datasets.summary(study.dataset)))
alike = study.dataset.manifest.groupby("look").size().value_counts()
report.show(alike.rename("groups").rename_axis("images that look alike"))

# %%
report.show(split.audit(study.dataset))

# %%
labels = study.labels(study.rows("train")).cpu().numpy()
shown = np.concatenate([study.rows("train")[labels == c][:6] for c in (0, 1)])
titles = study.dataset.manifest.loc[shown, ["class_name", "group"]].agg("\n".join, axis=1)
figure = plots.figure_samples(study.images(shown).cpu().numpy(), titles, run.caption)
report.save_figure(figure, run, "samples")
figure

# %% [markdown]
# *What to see.* A fracture shows as a dark line across the bone and as fragments out of line. The images keep their shape
# and are padded to a square, which raises a question:
#
# **What does the size of an image give away?** Before any network: can the class be told from height and width alone? The
# table cross-validates a small model on nothing but the shape. An AUC (area under the ROC curve: 0.5 is guessing) above
# 0.5 is a shortcut that every network trained on these images may take, because padding keeps the shape visible.

# %%
report.show(explore.size_shortcut(study.dataset, study.cache.shapes, draws=run.bootstrap_draws))


# %% [markdown]
# **The augmentation that gave the label away.** The published code rotated images of *one class only* (with black
# corners), in training, validation and test alike. Five lines find out what that does: count the exactly black pixels in
# an image's four corners, and ask how well that number tells the classes apart.

# %%
def black_corners(image):
    part = len(image) // 8
    ends = slice(None, part), slice(-part, None)
    return sum(int((image[down, across] == 0).sum()) for down in ends for across in ends)


def rotated(image, rng):
    turn = cv2.getRotationMatrix2D((len(image) / 2, len(image) / 2), rng.uniform(-20, 20), 1)
    return cv2.warpAffine(image, turn, image.shape)


# %%
rng = np.random.default_rng(run.seed)
rows = rng.permutation(study.rows("train"))[:400]
images, sick = np.maximum(study.cache.images[rows], 1), study.dataset.manifest["label"][rows].eq(1)
alike = [black_corners(rotated(image, rng)) for image in images]
turned = [rotated(image, rng) if s else image for image, s in zip(images, sick, strict=True)]
counted = {"the same for both classes": alike}
counted["of one class only, as published"] = [black_corners(image) for image in turned]
table = {name: roc_auc_score(sick, count) for name, count in counted.items()}
report.show(pd.Series(table, name="AUC of counting black pixels").rename_axis("augmentation"))


# %% [markdown]
# **What we learnt.** With one augmentation for both classes the corners tell nothing, with the published one they read the
# label. All accuracies of that study, clean and attacked, carry this leak. Look for what tells the label *before* training.

# %% [markdown]
# ## 2 Training MobileNetV2, three ways
#
# One network, one recipe (Adam, one-cycle rate, the suite's augmentation, the same for both classes), three losses:
#
# | model | loss |
# |---|---|
# | standard | cross-entropy; the fractures together weigh as much as all other images together |
# | pgd_at | cross-entropy on attacked images (Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, 2018, [1706.06083](https://arxiv.org/abs/1706.06083)) |
# | trades | cross-entropy on clean images + $\beta\,\mathrm{KL}(p(x)\,\|\,p(x'))$, $\beta = 6$ (Zhang et al., *Theoretically Principled Trade-off between Robustness and Accuracy*, 2019, [1901.08573](https://arxiv.org/abs/1901.08573)); KL is the Kullback-Leibler divergence of the answers to the clean and the attacked image |
#
# `pgd_at` never sees a clean image, so it goes on from the trained `standard` (`at_start`; the tiny smoke network starts
# afresh): who cannot see a fracture yet learns little from attacked ones, or learns to read the attack instead (section 8).
# TRADES has clean images and starts afresh. Both choose their epoch by balanced validation accuracy, half clean and half
# *under attack*: with most of the images healthy, a model that never sees a fracture would look robust.

# %%
def attack_steps(study):
    steps = {"eps": run.at_eps, "steps": run.at_steps, "step_size": run.at_step_size}
    return steps | {"weight": study.class_weights()}


def train_standard(study):
    loss = objectives.cross_entropy(weight=study.class_weights())
    return train_model(study, "standard", loss, monitor="val_auc")


def train_pgd_at(study):
    loss = objectives.pgd_adversarial(**attack_steps(study))
    chosen = suite.choose_under_attack(study, steps=run.pgd_steps)
    return train_model(study, "pgd_at", loss, start=run.at_start, **chosen)


def train_trades(study):
    loss = objectives.trades(**attack_steps(study), beta=run.trades_beta)
    chosen = suite.choose_under_attack(study, steps=run.pgd_steps)
    return train_model(study, "trades", loss, **chosen)


# %% [markdown]
# **A new head on frozen features.** The original study trained only a head on features learnt elsewhere. The idea in five
# lines: the body in eval mode and without gradients, its features computed once, a linear layer trained on them.
#
# ```python
# with torch.no_grad():
#     features = body.eval()(images)               # [N, C], computed once
# head = torch.nn.Linear(features.shape[1], 2)
# loss = F.cross_entropy(head(features), labels)   # only the head has gradients
# ```
#
# Two things must be right: the frozen part stays in eval mode (else its batch statistics drift to the new images, batch by
# batch), and nobody should expect a robust head to make fragile features robust. `linear_probe` is a plain last layer on
# frozen pretrained features; `robust_probe` is the same layer trained on attacked images. The original's two-layer head is
# the setting `head = "mlp"`.

# %%
def with_new_head():
    return models.with_head(build_model(run), head=run.head, seed=run.seed)


def train_linear_probe(study):
    loss = objectives.cross_entropy(weight=study.class_weights())
    return train_head(study, "linear_probe", with_new_head(), loss)


def train_robust_probe(study):
    loss, model = objectives.pgd_adversarial(**attack_steps(study)), with_new_head().to(run.device)
    options = {"epochs": max(1, run.epochs // 3)} | suite.choose_under_attack(
        study, steps=run.pgd_steps
    )
    return train_head(study, "robust_probe", model, loss, augmented=True, **options)


# %% [markdown]
# **Train them.** With two GPUs two models train at a time; models already trained are read back. `more_seeds` adds the same
# trainings under other seeds.

# %%
study = open_study(run)
first = {"standard": train_standard, "linear_probe": train_linear_probe}
after = {"pgd_at": train_pgd_at, "trades": train_trades, "robust_probe": train_robust_probe}
fitted, logs = {}, run.run_dir / "logs"
for wave, repeated in ((first, "standard"), (after, "pgd_at")):
    makers = {name: partial(make, study) for name, make in wave.items()}
    for seed in run.more_seeds:
        makers[f"{repeated}, seed {seed}"] = partial(wave[repeated], study_of(repeated, seed))
    fitted |= launch.each(lambda name, to=makers: to[name](), list(makers), log_dir=logs)
print("starting weights:", weights_label(run))
report.show(report.trainings(fitted), digits=3)

# %%
whole = ("standard", "pgd_at", "trades")
histories = {name: pd.read_csv(run.run_dir / name / "metrics.csv") for name in whole}
figure = plots.figure_history(histories, run.caption)
report.save_figure(figure, run, "training")
figure

# %% [markdown]
# *What to see.* The curves jump where the one-cycle rate is highest, a third of the way; each model keeps its best epoch,
# named in the table. Learning under attack is slower: its loss falls later.
#
# **What we learnt.** The three networks differ in the loss, and `pgd_at` in where it starts. A head alone is trained in
# seconds, on features that it cannot change.

# %% [markdown]
# ## 3 Robust models of the literature
#
# The table is what their authors reported on CIFAR-10, in per cent: *clean*, and *robust* under AutoAttack at 8/255 (Croce
# and Hein, *Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks*, 2020).
# *adaptive* is what an attack left that was made for the model's own trick: MeanSparse replaces features by their mean
# where they are close to it, and its gradient is zero there. Under an attack that goes straight through the operator (BPDA:
# backward pass differentiable approximation) it falls to 73.10, *below* the 73.71 of the model that it was built on
# (Bartoldson et al., *Adversarial Robustness Limits via Scaling-Law and Human-Alignment Studies*, 2024,
# [2404.09349](https://arxiv.org/abs/2404.09349)).

# %%
columns = ["title", "parameters", "megabytes", "clean", "robust", "adaptive", "licence"]
report.show(robust.names()[columns])

# %% [markdown]
# **How to load them without fooling oneself.** The original study loaded one checkpoint with `strict=False`, matched no
# key at all and fine-tuned a *random* network; and it normalised images for models that want raw pixels or normalise by
# themselves. What `strict=False` hides, in five lines:

# %%
network = torch.nn.Linear(3, 2)
before = network.weight.clone()
checkpoint = {"module.weight": torch.ones(2, 3), "module.bias": torch.ones(2)}  # foreign names
print(network.load_state_dict(checkpoint, strict=False))
print("weights loaded:", not torch.equal(before, network.weight))


# %% [markdown]
# Here a file must fit key by key (`load_report`), the model takes [0, 1] and owns its normalisation, and average pooling
# replaces the fixed 8 x 8 window, so that any image size works. Downloads need internet; a model that cannot be fetched is
# named and left out.
#
# The body is frozen, its features are computed once, and the head learns from them; a linear head is a convex problem
# with one optimum, so its last epoch is kept. A MeanSparse model first gets the statistics of the *training* images, then
# the width $\alpha$ of its dead zone on *validation* images, by the worse of the exact and the straight-through attack.

# %%
def train_robust_model(name):
    return suite.train_robust_model(study_of(name), name)


if run.zoo:
    study_of(run.zoo[0])  # decode once, before processes share the images
else:
    print(
        "None in this profile: 5 to 60 billion multiplications an image are no work for a laptop."
    )
    print("With internet and a GPU (Kaggle, say), PROFILE = 'full' downloads them all.")
loaded = launch.each(train_robust_model, list(run.zoo), log_dir=run.run_dir / "logs")
report.show(pd.DataFrame(loaded.items(), columns=["model", "checkpoint"]))

# %%
for name in trained(open_study(run), run.zoo):
    if (run.run_dir / name / "alpha.csv").exists():
        print(f"{name}: the dead zone, chosen on validation images")
        display(report.show(pd.read_csv(run.run_dir / name / "alpha.csv")))

# %% [markdown]
# **What we learnt.** Load strictly, and print what was loaded. A published robustness is a number for its own data set and
# its own attack; an operator that hides gradients needs an attack that goes through it.

# %% [markdown]
# ## 4 The clean test
#
# The test split is opened here, after every choice has been made. A false negative is a missed fracture: look at
# *sensitivity* (fractures found) before accuracy, which always answering "not fractured" already brings to the share
# printed here. *Balanced accuracy* is the mean of sensitivity and specificity: 0.5 for a constant answer. Brackets are 95 %
# intervals from a bootstrap over groups of images that belong together.

# %%
study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
test_opened(study, "clean metrics of all models")
rows, options = study.rows("test"), {"threshold": 0, "draws": run.bootstrap_draws}
labels, patients = study.labels(rows).cpu().numpy(), study.patients(rows)
print(f"always 'not fractured': right on {1 - labels.mean():.1%} of {len(labels)} test images")
scores, clean = {}, []
for name in names:
    own = study_of(name)  # log-odds do not saturate, as a probability would
    scores[name] = train.log_odds(load_models(own, [name])[name], own.torch_set("test"))
    outcome = metrics.classification(labels, scores[name], patients, **options)
    clean.append(report.result_rows(outcome, own.run, model=name))

# %%
clean = pd.concat(clean)
report.update_results(clean, RESULTS)
only = "balanced_accuracy auc accuracy sensitivity specificity precision recall f1".split()
report.show(report.wide(clean, only=only, intervals=only[:2]))

# %%
predictions = study.dataset.manifest.loc[rows, ["path", "label"]]
predictions = predictions.assign(**{name: expit(score) for name, score in scores.items()})
files.write_csv(predictions, run.run_dir / "predictions.csv")
figure = plots.figure_roc(labels, {name: scores[name] for name in names[:7]}, run.caption)
report.save_figure(figure, run, "roc")
figure

# %% [markdown]
# *What to see.* The nearer a curve comes to the upper left corner, the better it ranks fractures above whole bones. Heads
# on features that were learnt on photographs of 32 px rank worse than a network whose whole body was fitted.
#
# The stand-ins of the smoke profile for the large networks have 16 to 24 features each, learnt at 32 px: little to tell a
# fracture by, and some of them hardly do better than guessing. What they would do at full size is not known here.
#
# **What we learnt.** Fitting only a head is quick, and limited by what the frozen features can tell.

# %% [markdown]
# ## 5 Attacks
#
# eps is in pixel units: the number of grey levels (of 255) that any pixel may move. The published study meant PGD
# (projected gradient descent) at 4/255, ten steps of 1/255 from a random start, but added it to *normalised* images
# without rescaling, which made it about 1/255. Our `pgd_ce` at 4/255 is the attack it meant. Beside it stands the whole
# suite of notebook 01: random noise, FGSM, PGD on the logit margin, APGD with both losses, the searches for the smallest
# change (DeepFool, FMN), Square, which sees no gradient, and for MeanSparse models PGD and APGD again straight through the
# operator. The **worst case** counts an image as right only if none of them fooled it at this or a smaller eps.
# The large networks meet a smaller suite (`zoo_suite`), for want of a GPU's time: a gap by which one of them beats
# a MobileNetV2 may be the attacks that it was spared.

# %%
study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
test_opened(study, "the suite of attacks in pixel units")


def attacked(name):
    return suite.attack(study_of(name), name).rows


for name, per_image in launch.each(attacked, names, log_dir=run.run_dir / "logs").items():
    own = study_of(name)
    falls = report.direction_rows(per_image, own, model=name, eps=run.headline_eps)
    rows = pd.concat([report.accuracy_rows(per_image, own, model=name), falls])
    results = report.update_results(rows, RESULTS)
report.show(report.results_table(results[results.attack.isin(["clean", "worst"])]))

# %% [markdown]
# The table in the form of the published study (clean and PGD accuracy in per cent, eps 4/255), with what it lacked: the
# worst case, and its two directions. *Sensitivity* under attack is the share of fractures still found, *specificity* the
# share of whole bones still called whole.

# %%
report.show(report.attack_table(results, eps=run.headline_eps))

# %%
answers = np.bincount(study.labels(study.rows("test")).cpu())
options = {"attack": "worst", "constant": answers.max() / answers.sum()}
options["told_at"] = run.headline_eps
figure = plots.figure_accuracy_vs_eps(results, run.caption, note="Worst case", **options)
report.save_figure(figure, run, "worst_case")
figure

# %% [markdown]
# *What to see.* The plain network and the heads fall early; training against attacks holds longest. A model that stays
# exactly at the dotted line gives everybody the same answer: nothing to attack, and nothing learnt.
#
# Which way do the errors go? Confusion matrices of the images attacked with PGD at the headline eps.

# %%
per_image = {}
for name in names:
    per_image[name] = stored(study_of(name), f"robust_{name}", model=name, section="5 Attacks")
answers = {}
for name in MODELS:
    at = per_image[name].attack.eq("pgd_ce") & np.isclose(per_image[name].eps, run.headline_eps)
    own = per_image[name][at].sort_values("image")
    truth = own["label"].to_numpy()
    answers[name] = truth ^ own["fooled"].to_numpy(bool)  # who is fooled names the other class
figure = plots.figure_confusion(truth, answers, study.dataset.classes, run.caption)
report.save_figure(figure, run, "confusion_attacked")
figure

# %% [markdown]
# *What to see.* The lower left field of each matrix are fractures that the attack hides, the upper right field whole bones
# that it breaks. scikit-learn's report for the model that holds best under PGD:

# %%
held = {name: (answer == truth).mean() for name, answer in answers.items()}
best = max(held, key=held.get)
print(f"{best}, PGD at {eps_text(run.headline_eps)}")
words = {"target_names": study.dataset.classes, "zero_division": 0}
print(classification_report(truth, answers[best], **words))

# %% [markdown]
# **What we learnt.** The unit decides: at the eps that the published code really used, everything looks robust. In grey
# levels, by the worst case, a robust *head* on fragile features is no defence.

# %% [markdown]
# ## 6 Masked gradients
#
# A model can look robust because the attack's gradient vanishes, not because the decision is stable. Compare PGD with two
# losses and count exactly zero gradients (notebook 01, section 6, shows why), and run the check list of Carlini et al. (*On
# Evaluating Adversarial Robustness*, 2019, [1902.06705](https://arxiv.org/abs/1902.06705)) as checks that can fail. A WARN
# is a finding about the *evaluation* of that model: do not believe its robust accuracy before you know why.

# %%
study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
test_opened(study, "share of zero gradients")
shares, checks = {name: suite.zero_gradients(study_of(name), name) for name in names}, []
for name in names:
    checks.append(stored(study_of(name), f"checks_{name}", model=name, section="5 Attacks"))
results = report.update_results(report.zero_gradient_rows(shares, study), RESULTS)

# %%
checks = pd.concat(dict(zip(names, checks, strict=True)), names=["model"]).reset_index("model")
warned = checks.loc[checks["verdict"].eq("WARN"), ["verdict", "model", "check", "value"]]
print(f"{len(checks) - len(warned)} of {len(checks)} checks passed")
report.show(warned.reset_index(drop=True))

# %%
masking = report.masking_table(results, eps=run.headline_eps)
report.show(masking)


# %% [markdown]
# *What to see.* A gap between the two losses, or a share of zero gradients, is the mark of masked gradients. For MeanSparse
# the attacks straight through the operator stand in the suite already. That *twice the steps* warns in a smoke run is right:
# its attacks have four.
#
# **What we learnt.** "Robust" in a table is a claim about the attack as much as about the model; two losses and a count of
# zeros cost one line each.

# %% [markdown]
# ## 7 Where do they look?
#
# The simplest map is one gradient: by how much does the fracture's logit change if a pixel does?
#
# ```python
# x.requires_grad_()
# (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
# saliency = gradient.abs().amax(1)                # [N, H, W]
# ```
#
# Five kinds of map, all for the class *Fractured*, all on fractured images of the **test** split, whole (the published
# study cut each image into four tiles, explained whatever class was predicted, and used training images too):
#
# | map | what it shows | source |
# |---|---|---|
# | saliency | size of the gradient of the fracture logit at each pixel | Simonyan et al., *Deep Inside Convolutional Networks*, 2014 |
# | integrated gradients | gradient x change, summed on the way from a black image; sums to the change of the logit | Sundararajan et al., *Axiomatic Attribution for Deep Networks*, 2017 |
# | DeepLIFT | the same sum by rules instead of a path; **refused** where there is no rule for a layer | Shrikumar et al., *Learning Important Features through Propagating Activation Differences*, 2017 |
# | occlusion | how much the logit drops when a window is covered | Zeiler and Fergus, *Visualizing and Understanding Convolutional Networks*, 2014 |
# | Grad-CAM | which places of the last feature map speak for the class | Selvaraju et al., *Grad-CAM*, 2017 |
#
# The completeness error (does the map sum to what it explains?) is kept for each, because captum's DeepLIFT gives a wrong
# map without a word for ReLU6, SiLU and reused modules. Those are repaired here or refused.

# %%
def map_options(model, study):
    window = max(4, run.occlusion_window * study.run.size // run.size)
    options = {"saliency": {}, "integrated_gradients": {"steps": run.integrated_steps}}
    options |= {"deeplift": {}, "occlusion": {"window": window}}
    return options | {"gradcam": {"layer": models.last_map_layer(model)}}


def explained(study, name, rows):
    """Maps [N,S,S] in [0,1] of every method that works, and what each said about itself."""
    model, x, maps, notes = load_models(study, [name])[name], study.images(rows), {}, []
    for method, extra in map_options(model, study).items():
        note = {"model": name, "map": method}
        try:
            found = explain(method, model, x, 1, **extra)
        except ValueError as error:
            notes.append(note | {"remark": f"refused: {error}"[:140]})
            continue
        maps[method] = found.heat().cpu().numpy()
        note["completeness error"] = np.nan if found.error is None else found.error.max().item()
        notes.append(note | {"zero maps": int(found.zero.sum())})
    return maps, pd.DataFrame(notes)


# %%
def boxed_rows(study, count):
    """Fractured test images that have a box, at most `count`."""
    return np.intersect1d(study.rows("test"), study.dataset.boxes["image"].to_numpy())[:count]


study = open_study(run)
test_opened(study, "maps of fractured images")
rows = boxed_rows(study, 3)
boxes = localisation.regions_of(study.dataset, rows, study.cache)
for name in ("standard", "pgd_at"):
    maps, _ = explained(study, name, rows)
    told = [f"{name}: {study.dataset.manifest.path[row][-14:]}" for row in rows]
    options = dict(captions=told, caption=run.caption, boxes=boxes)
    figure = figures.figure_overlays(study.images(rows).cpu().numpy(), maps, **options)
    report.save_figure(figure, run, f"overlays_{name}")
    display(figure)


# %% [markdown]
# *What to see.* The box is the radiologist's (here: the phantom's) mark. Does the heat lie in it? And would you have
# believed the map if there were no box? A picture convinces too easily, hence:
#
# **Scored against the radiologists' marks.** Every map of every fractured test image against the fracture boxes and
# outlines:
#
# - *coverage gain*: the share of the box that the hottest 5 % of pixels cover, minus the 5 % that any map covers by chance;
# - *pointing*: is the hottest pixel in the box?
# - *energy gain*: the share of the heat in the box, minus the box's share of the image;
# - *AUPRC*: the area under the precision-recall curve of the pixels.
#
# The three reference rows come from no model: random pixels, a Gaussian in the centre (the centre prior), the edges of the
# image. A method that does not beat **all** of them has not found the fracture.

# %%
@cache
def scored(name, seed):
    """Per image and map the scores against boxes and outlines, and each method's remarks."""
    study, tables = study_of(name, seed), []
    rows = boxed_rows(study, run.maps)
    maps, notes = explained(study, name, rows)
    images, groups = study.images(rows).cpu(), study.patients(rows)
    for kind in ("box", "outline"):
        regions = localisation.regions_of(study.dataset, rows, study.cache, kind=kind)
        found = localisation.localise(maps, images, regions, groups=groups)
        tables.append(found.assign(region=kind))
    return pd.concat(tables), notes


def kept_maps(name, seed=run.seed):
    """The scores of model `name`, from the run folder or anew; its remarks are kept beside them."""
    study, told = study_of(name, seed), "maps occlusion_window integrated_steps seed size"
    given = {"model": name, "uses": told.split()}
    stored(study, f"remarks_{name}", lambda: scored(name, seed)[1], **given)
    return stored(study, f"maps_{name}", lambda: scored(name, seed)[0], **given)


# %%
def map_rows(summary, study, name):
    """Result rows of map scores: the map goes under attack, its score and region under metric."""
    named = {
        "attack": "map " + summary["map"],
        "metric": summary["score"] + " " + summary["region"],
    }
    rows = summary.assign(**named).filter(report.RESULT_COLUMNS)
    return report.result_rows(rows.assign(model=name), study.run)


# %%
def blind_rows(paired, study, name):
    """Result rows of what a map's coverage of the boxes gains over each map that knows nothing."""
    own = paired[paired.score.eq("coverage_gain")]
    return map_rows(own.assign(region="box, minus " + own["reference"]), study, name)


# %%
study = open_study(run)
looked = ["standard", "pgd_at", "trades", *trained(study, run.zoo[: run.zoo_maps])]
test_opened(study, "maps scored against boxes and outlines")
scores, differences, draws = [], [], run.bootstrap_draws
for name in looked:
    for kind, part in kept_maps(name).groupby("region"):
        summary = localisation.summarise(part, draws=draws).assign(region=kind, model=name)
        report.update_results(map_rows(summary, study_of(name), name), RESULTS)
        paired = localisation.against_references(part, draws=draws)
        scores.append(summary)
        differences.append(paired.assign(region=kind, model=name))
        if kind == "box":
            report.update_results(blind_rows(paired, study_of(name), name), RESULTS)
scores, differences = pd.concat(scores), pd.concat(differences)
saved = files.write_csv(differences, run.run_dir / "map_differences.csv")

# %%
boxed = scores[scores.region.eq("box")]
only = list(dict.fromkeys(boxed.score))
report.show(report.wide(boxed, "score", down=["model", "map"], only=only, intervals=only[:1]))

# %%
for name in looked[:3]:
    caption = f"{name}; {min(run.maps, len(boxed_rows(study, run.maps)))} fractures; {run.caption}"
    options = dict(panel="score", row="map", chance="random")
    figure = figures.figure_forest(boxed[boxed.model.eq(name)], caption, **options)
    report.save_figure(figure, run, f"localisation_{name}")
    display(figure)

# %% [markdown]
# *What to see.* The dotted line is random pixels. A method is worth showing to a clinician only if its interval lies right
# of all three references; look at the centre first, since fractures tend to lie near the middle of an image.
#
# What the methods said about themselves: refusals, maps that are zero everywhere, the largest completeness error.

# %%
where, remarks = "7 Where do they look?", []
for name in looked:
    remarks.append(stored(study_of(name), f"remarks_{name}", model=name, section=where))
report.show(pd.concat(remarks).reset_index(drop=True), digits=3)

# %% [markdown]
# **Do robust models look better?** The published study says so. Method by method, each model's map against the plain
# model's on the *same* images: differences with their intervals. Twenty comparisons a model, not adjusted: one in twenty
# would clear 0 by chance alone.

# %%
study, where, per_map = open_study(run), "7 Where do they look?", {}
for name in ["standard", "pgd_at", "trades", *trained(study, run.zoo[: run.zoo_maps])]:
    table = stored(study_of(name), f"maps_{name}", model=name, section=where)
    per_map[name] = table.query("region == 'box'")

# %%
better, plain, draws = [], per_map["standard"], run.bootstrap_draws
for name in list(per_map)[1:]:
    gained = localisation.against_model(per_map[name], plain, draws=draws)
    gained = gained.assign(model=name, region="box, minus standard")
    report.update_results(map_rows(gained, study_of(name), name), RESULTS)
    better.append(gained)
only = list(dict.fromkeys(better[0].score))
options = dict(down=["model", "map"], only=only, intervals=only[:1], signed=True)
report.show(report.wide(pd.concat(better), "score", **options))

# %% [markdown]
# **And after another training?** One training is one draw: another seed, another order of the images, another map. A
# difference between two models counts only if it is larger than what another seed does to either.
# `CHANGES = {"more_seeds": (1, 2)}` trains both models again under those seeds, on the same split. Below: mean ± standard
# deviation over the seeds, and `pgd_at` minus `standard` image by image, seed by seed; an image stays one piece of evidence
# however many seeds it has.

# %%
pairs = {name: {run.seed: per_map[name]} for name in ("standard", "pgd_at")}
for seed in run.more_seeds:
    test_opened(open_study(run), f"maps scored, seed {seed}")
    for name, found in pairs.items():
        found[seed] = kept_maps(name, seed).query("region == 'box'")
        summary = localisation.summarise(found[seed], draws=draws).assign(region="box", model=name)
        report.update_results(map_rows(summary, study_of(name, seed), name), RESULTS)
        paired = localisation.against_references(found[seed], draws=draws)
        report.update_results(blind_rows(paired, study_of(name, seed), name), RESULTS)


# %%
def over_seeds(tables):
    """Of each map the mean coverage gain over the seeds, ± the standard deviation between them."""
    own = pd.concat(tables, names=["seed"])
    own = own[~own["map"].isin(REFERENCES)].groupby(["seed", "map"], sort=False)
    means = own["coverage_gain"].mean().groupby("map", sort=False)
    spread = means.std().map(lambda sd: f" ± {sd:.3f}" * bool(sd >= 0))
    return means.mean().map("{:.3f}".format) + spread


# %%
def pooled(tables):
    """Per map and image the mean score over the seeds."""
    both = pd.concat(tables).groupby(["map", "image"], sort=False, as_index=False)
    return both.mean(numeric_only=True)


# %%
robust_maps, plain_maps = pooled(pairs["pgd_at"]), pooled(pairs["standard"])
gained = localisation.against_model(robust_maps, plain_maps, draws=draws)
seeds = f"seed{'s' * bool(run.more_seeds)} " + " ".join(map(str, pairs["pgd_at"]))
if run.more_seeds:
    gained = gained.assign(region="box, minus standard")
    report.update_results(map_rows(gained, open_study(run), f"pgd_at, {seeds}"), RESULTS)
    for name, maps in (("standard", plain_maps), ("pgd_at", robust_maps)):
        paired = localisation.against_references(maps, draws=draws)
        report.update_results(blind_rows(paired, study, f"{name}, {seeds}"), RESULTS)

# %%
gained = gained[gained.score.eq("coverage_gain")].set_index("map")
table = pd.DataFrame({name: over_seeds(tables) for name, tables in pairs.items()})
table.columns = ["plain", "PGD-AT"]
gained = gained.loc[table.index].iterrows()
table["PGD-AT minus plain"] = [report.with_interval(row, signed=True) for _, row in gained]
report.show(table, notes=f"Coverage gain, {seeds}.")

# %% [markdown]
# *What to see.* One seed has no spread. With several, compare the last column with the numbers behind ±: the interval speaks
# of other fractures, the standard deviation of other trainings, and a gain has to be clear of both.

# %% [markdown]
# **Does the map depend on the model at all?** Layer by layer, from the last one down, the weights are replaced by noise
# (Adebayo et al., *Sanity Checks for Saliency Maps*, 2018, [1810.03292](https://arxiv.org/abs/1810.03292)). A map that
# explains the model must change. The dotted line is the likeness of the maps of two *different* images: as unlike as maps
# of that method get.

# %%
study = open_study(run)
model, x = load_models(study, ["standard"])["standard"], study.images(boxed_rows(study, 8))
chosen = {name: map_options(model, study)[name] for name in ("saliency", "gradcam", "occlusion")}
given = {"model": "standard", "uses": ["maps", "occlusion_window", "seed"]}
randomised = {}
for method, extra in chosen.items():
    options = dict(target=1, steps=6, seed=run.seed, **extra)
    made = partial(localisation.sanity, model, x, method, **options)
    randomised[method] = stored(study, f"randomised_{method}_standard", made, **given)
figure = figures.figure_randomisation(randomised, run.caption)
report.save_figure(figure, run, "randomised")
figure

# %% [markdown]
# *What to see.* A line that stays high while the network turns to noise belongs to a method that draws the image, not the
# model.
#
# **What we learnt.** Score maps against marks and against maps that know nothing; compare two models on the same images;
# and randomise the weights once. A convincing picture is none of these.

# %% [markdown]
# ## 8 Verdict
#
# Every model against the plain one on the *same* images: McNemar's exact test (McNemar, *Note on the Sampling Error of the
# Difference between Correlated Proportions or Percentages*, 1947) counts only images on which the two disagree, with Holm's
# adjustment for the number of comparisons (Holm, *A Simple Sequentially Rejective Multiple Test Procedure*, 1979). The
# sentences are written by code from this run's numbers, so that they cannot claim more than the run shows.

# %%
study = open_study(run)
names, per_image = [*MODELS, *trained(study, run.zoo)], {}
for name in names:
    per_image[name] = stored(study_of(name), f"robust_{name}", model=name, section="5 Attacks")
paired = report.paired_tests(per_image, study, eps=run.headline_eps, reference="standard")
files.write_csv(paired, run.run_dir / "paired_tests.csv")
results = pd.read_csv(made_by(run, "results.csv", "5 Attacks"))
masking = report.masking_table(results, eps=run.headline_eps)
Markdown(report.verdict(results, masking, paired, run, reference="standard"))

# %% [markdown]
# And the maps: which beat all three references, image by image (the 95 % interval of the difference lies above 0)?

# %%
differences = pd.read_csv(made_by(run, "map_differences.csv", "7 Where do they look?"))
own = differences[differences.region.eq("box") & differences.score.eq("coverage_gain")]
hardest = own.loc[own.groupby(["model", "map"], sort=False)["value"].idxmin()]
gains = [report.with_interval(row, signed=True) for _, row in hardest.iterrows()]
told = hardest[["model", "map", "reference"]].rename(columns={"reference": "hardest reference"})
told["coverage gain over it"] = gains
told["beats all three"] = own.groupby(["model", "map"], sort=False)["ci_low"].min().gt(0).to_numpy()
report.show(told.reset_index(drop=True))

# %% [markdown]
# ### The real study
#
# FracAtlas, 222 test images of 4,083, the `cpu` profile: 160 px, MobileNetV2 from pretrained features, 10 epochs, seed 0; the
# maps of `standard` and `pgd_at` with two more seeds.
# The eight networks of the literature could not be fetched where this was run, so their part is open.
#
# <!-- table study-02 -->
#
# ![Worst-case accuracy against eps on real fractures: PGD-AT holds best, the heads on frozen features fall at once](attachment:fractures.png)
#
# - Plain training and both heads on frozen features are at **0.000** at 4/255: a robust head does not make fragile features
#   robust.
# - PGD-AT keeps 0.559 of the images, TRADES 0.171: far from usable, and far from nothing.
# - 150 of the 222 are not fractured: always answering so is right on 0.676, whatever the attack. PGD-AT is clearly above that
#   up to 1/255 (0.739), and below it at 4/255; nothing else here is clearly above it at any eps.
# - PGD-AT started from the pretrained features instead of from `standard` reached validation scores of 0.51, 0.57 and 0.73
#   under three seeds, and once learnt to read the attack; from `standard` 0.76 under all three.
# - Maps: occlusion of the plain model and saliency of PGD-AT beat the centre prior, each under two of three seeds. PGD-AT's
#   saliency covers more of the boxes than the plain model's (+0.12), its occlusion map less (-0.14): one kind of map can tell
#   either story.
# - Every map's score, beside the three references: [results/README.md](../results/README.md).

# %% [markdown]
# **What we learnt.** Robustness does not come with a head, and heat maps have to be measured. The promising table of the
# published study rests on a leak, a unit and a missing worst case.

# %% [markdown]
# ## Takeaways
#
# - Look for what gives the label away (sizes, corners) before any training.
# - `strict=False` can leave a network random; print what was loaded.
# - A new head inherits the fragility of its features.
# - Heat maps need marks, references and a randomisation test; a picture proves nothing.

# %% [markdown]
# ## Exercises
#
# Try each before you open its solution.

# %% [markdown]
# **Exercise 1.** Another leak: can the *mean grey value* of an image tell the classes apart? Compute its AUC on training
# images.
#
# <details><summary>Solution</summary>
#
# ```python
# study = open_study(run)
# rows = study.rows("train")
# mean = study.cache.images[rows].reshape(len(rows), -1).mean(1)
# area = roc_auc_score(study.labels(rows).cpu().numpy(), mean)
# print(f"AUC of the mean grey value: {max(area, 1 - area):.3f}")
# ```
#
# </details>
#
# Anything clearly above 0.5 is information that a network will use, wanted or not.

# %% [markdown]
# **Exercise 2.** Write saliency in three lines and score it: in how many of the fractured test images lies its hottest
# pixel in the box, for the plain and for the adversarially trained network?
#
# <details><summary>Solution</summary>
#
# ```python
# study = open_study(run)
# rows = np.intersect1d(study.rows("test"), study.dataset.boxes["image"].to_numpy())[: run.maps]
# boxes = localisation.regions_of(study.dataset, rows, study.cache)
# for name, model in load_models(study, ["standard", "pgd_at"]).items():
#     x = study.images(rows).requires_grad_()
#     (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
#     maps = {"mine": gradient.abs().amax(1).cpu().numpy()}
#     found = localisation.localise(maps, x.detach().cpu(), boxes, groups=study.patients(rows))
#     hit = found.loc[found["map"].eq("mine"), "pointing"].mean()
#     print(f"{name}: the hottest pixel lies in the box in {hit:.0%} of {len(rows)} images")
# ```
#
# </details>
#
# With a few images the two shares can differ by chance: count the images before you believe a difference.

# %% [markdown]
# **Exercise 3.** The published attack forgot to rescale eps. How many grey levels is an eps of 4/255 in *normalised* units,
# for each colour channel of ImageNet's normalisation?
#
# <details><summary>Solution</summary>
#
# ```python
# std = load_models(open_study(run), ["standard"])["standard"].std.flatten()
# for channel, one in zip("red green blue".split(), std.tolist(), strict=False):
#     print(f"{channel}: {4 * one:.2f} of 255")
# ```
#
# </details>
#
# About one grey level: a quarter of what the table claims.

# %% [markdown]
# ## Results and files
#
# Copy rows of `results.csv` into your own comparison: each says model, attack, eps, interval, n, seed, size, epochs,
# profile, data and hardware.

# %%
report.written(run)
