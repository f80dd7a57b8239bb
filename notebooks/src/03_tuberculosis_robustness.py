# %% [markdown]
# # 03 Tuberculosis: right on 88 images in 100, and blind to seven sick people in ten
#
# The *TB Chest Radiography Database* holds five healthy images for every one with tuberculosis. Whoever calls all of
# them healthy is right on 83 %. A study that put robust CIFAR-10 models on these images reported an accuracy of 0.88,
# with a TB recall of 0.29: it found fewer than three in ten. Its networks worked on scrambled features and on images
# scaled by the wrong numbers, and nothing noticed, because they still learnt *something*. This notebook shows both bugs
# at work, then asks what comes first for a disease one must not miss: how many are found, at which threshold, at which
# price in false alarms, and how many of those found can an attack hide?
#
# **What you get**
#
# | part | question |
# |---|---|
# | 1 Data | Five to one, from different hospitals: what do the edges of an image give away? |
# | 2 Two bugs | Scrambled features and statistics of a single image, shown live |
# | 3 Training | MobileNetV2: plain, adversarial (PGD-AT), a new head on frozen features; robust models of the literature |
# | 4 Sensitivity first | The threshold that finds 95 % of TB, chosen on validation images, then the test |
# | 5 Attacks | Worst case over all attacks, TB images that an attack hides, masked gradients |
# | 6 Maps | Where plain and adversarial training look, and whether the maps depend on the model |
# | 7 Verdict | Paired tests and a plain answer |
#
# The protocol is that of [notebook 02](02_fracatlas_robust_models.ipynb), where attacks, robust models and maps are
# explained at length. The outputs stored in this file are from the smoke profile on *synthetic* images with tiny
# networks that learnt from others, and only show what you will see.
#
# *For research and teaching. Not a medical device.*

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"  # "smoke" (two minutes), "cpu" (laptop, one to two hours), "full" (GPU), "auto"
DATA_DIR = ""  # empty: find the data set; else the folder that holds Normal and Tuberculosis
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

# The data; fit "pad" keeps the aspect, unusable_share allows for files of which a third and more is
# missing
FULL = {"dataset": "tuberculosis", "seed": 0, "size": 224, "fit": "pad", "per_class": None}
FULL |= {"unusable_share": 0.01, "val_share": 0.1, "test_share": 0.1, "sensitivity": 0.95}
# MobileNetV2, and the recipe of every training; balance "weights" of the classes in the loss, or
# "sampling"
FULL |= {"width": 1.0, "stages": 7, "pretrained": True, "epochs": 30, "batch_size": 32, "lr": 1e-3}
FULL |= {"schedule": "onecycle", "patience": None, "max_minutes": 90.0, "num_workers": 2}
FULL |= {"balance": "weights"}
# Adversarial training, and the head ("linear", or "mlp", the original study's)
FULL |= {"at_eps": 4 / 255, "at_steps": 7, "at_step_size": 1 / 255, "trades_beta": 6.0}
FULL |= {"head": "linear"}
# Robust models of the literature: weights "public" are downloaded, None is random; they were
# trained on 32 px
ZOO = ("chen2024_wrn_34_20", "gairat_wrn_28_10", "huang2021_wrn_34_r", "hat_wrn_34_10")
ZOO += ("rebuffi2021_wrn_70_16", "standard_wrn_28_10", "meansparse_wrn_94_16", "ra_wrn_70_16")
FULL |= {"zoo": ZOO, "zoo_weights": "public", "zoo_width": 1.0, "zoo_size": 64, "zoo_epochs": 30}
# maps of the first so many
FULL |= {"zoo_alphas": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3), "zoo_maps": None}

# %% tags=["settings"]
# The attacks of the suite: add or leave out; their budgets; the eps at which expensive ones run, if
# not at all
FULL |= {"attacks": evaluate.SUITE, "eps_grid": pixel_eps(0.5, 1, 2, 4, 8), "headline_eps": 4 / 255}
FULL |= {"pgd_steps": 10, "pgd_restarts": 1, "attack_batch": 64}
FULL |= {"budgets": {"square": {"steps": 2000}}}
FULL |= {"expensive": {"square": pixel_eps(4)}, "check_images": 50}
# The maps: of so many test images with a finding
FULL |= {"maps": 72, "occlusion_window": 28, "integrated_steps": 32, "bootstrap_draws": 2000}

# %% tags=["settings"]
EXPENSIVE = dict.fromkeys(("apgd_ce", "apgd_margin", "square"), pixel_eps(4))
SHORT = {name: {"steps": 30} for name in ("apgd_ce", "apgd_margin", "fmn")} | {
    "square": {"steps": 200}
}
CPU = {"size": 160, "epochs": 10, "num_workers": 0, "at_eps": 2 / 255, "at_steps": 2}
CPU |= {"at_step_size": 1.4 / 255}
# the zoo's networks are no work for a laptop
CPU |= {"zoo": (), "occlusion_window": 20, "integrated_steps": 16}
CPU |= {"budgets": SHORT, "expensive": EXPENSIVE, "check_images": 24}

TINY = {"apgd_ce": {"steps": 4}, "apgd_margin": {"steps": 4}, "fmn": {"steps": 5}}
TINY |= {"square": {"steps": 10}}
SMOKE = {"size": 48, "per_class": (160, 40), "val_share": 0.15, "test_share": 0.2, "width": 0.5}
SMOKE |= {"stages": 3}
SMOKE |= {"pretrained": "phantom", "epochs": 12, "batch_size": 16, "lr": 2e-3, "num_workers": 0}
SMOKE |= {"max_minutes": None}
SMOKE |= {"at_eps": 4 / 255, "at_steps": 2, "at_step_size": 2.8 / 255}
SMOKE |= {"zoo": ("gairat_wrn_28_10", "meansparse_wrn_94_16")}  # one of two families
SMOKE |= {"zoo_maps": 1, "zoo_weights": "phantom", "zoo_width": 1 / 40, "zoo_size": 32}
SMOKE |= {"zoo_epochs": 6}
SMOKE |= {"zoo_alphas": (0.0, 0.2), "eps_grid": pixel_eps(1, 4), "pgd_steps": 3, "budgets": TINY}
SMOKE |= {"expensive": EXPENSIVE, "check_images": 4, "maps": 6, "occlusion_window": 8}
SMOKE |= {"integrated_steps": 32, "bootstrap_draws": 200}

# %% tags=["start"]
from dlia_utils.run import start

run = start(
    "03_tuberculosis_robustness",
    dict(full=FULL, cpu=CPU, smoke=SMOKE),
    dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES),
    trains="3 Training",
    allowed={"attacks": evaluate.LINF, "zoo": ZOO, "pretrained": ("phantom",)},
)
print(run)

# %% tags=["imports"]
import numpy as np  # noqa: I001 (one line a module keeps this cell readable)
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dlia_utils.data import datasets, explore
from dlia_utils import plots
from dlia_utils import files, launch, metrics, models, objectives, report
from dlia_utils import shortcuts, train
from dlia_utils.data import split
from dlia_utils.attacks import checklist, evaluate
from dlia_utils.detect.figures import figure_pr
from dlia_utils.explain import activations, attribution, figures, localisation
from dlia_utils.attacks.alpha import select_alpha
from dlia_utils.models import robust
from dlia_utils import suite
from dlia_utils.suite import choose_under_attack
from dlia_utils.study import build_model, load_models, made_by, open_study, stored
from dlia_utils.study import (
    test_opened,
    train_head,
    train_model,
    trained,
    weights_label,
    work_folder,
)
from dlia_utils.units import eps_text

MODELS = ["standard", "pgd_at", "linear_probe"]
RESULTS = run.run_dir / "results.csv"


def study_of(name):
    """The images as the model `name` takes them: the robust models of the literature have a size
    of their own."""
    study = open_study(run)
    return study if name in MODELS else study.variant(size=run.zoo_size, epochs=run.zoo_epochs)


# %% [markdown]
# ## 1 The data
#
# 3,500 normal images and 700 with tuberculosis, all brought to 512 x 512 pixels by the authors of the collection. It
# names no patients and has no split. So one split is drawn here for all models, 80 / 10 / 10 and stratified, with
# byte-identical images and near-duplicates (perceptual hash, confirmed by correlation) on one side: the nearest one can
# get to a split by patient.

# %%
study = open_study(run)
print(study.dataset.split_rule)
display(datasets.summary(study.dataset))
always_healthy = 1 - study.labels(study.rows("train")).float().mean().item()
print(f"accuracy of calling every image normal: {always_healthy:.3f}, with a sensitivity of 0")

# %%
pd.set_option("display.max_colwidth", 100)
split.audit(study.dataset)

# %%
labels = study.labels(study.rows("train")).cpu().numpy()
shown = np.concatenate([study.rows("train")[labels == c][:6] for c in (0, 1)])
titles = study.dataset.manifest.loc[shown, "class_name"]
figure = plots.figure_samples(study.images(shown).cpu().numpy(), titles, run.caption)
report.save_figure(figure, run, "samples")
figure

# %% [markdown]
# **The classes come from different hospitals.** By its authors' account most normal images are from the RSNA pneumonia
# set (USA), the TB images from Shenzhen, Montgomery County and Belarus. Scanner, cropping, letters and grey scale differ
# with the class, and a network may name the hospital instead of the disease. Two quick checks: the class from height
# and width alone, and from parts of the image that hold no lung (a logistic regression on 16 x 16 thumbnails of which only
# the border, a tenth of the side, or the corners are left). On *validation* images: the test split is still closed.

# %%
study = open_study(run)
display(
    explore.size_shortcut(study.dataset, study.cache.shapes, draws=run.bootstrap_draws).round(3)
)
rng, parts = np.random.default_rng(run.seed), []
for part in ("train", "val"):
    rows = rng.permutation(study.rows(part))[:800]
    images = study.images(rows)
    parts.append(shortcuts.sample(study.dataset, study.cache, images, rows))
regions = shortcuts.region_accuracy(
    shortcuts.linear_probe(),
    *parts,
    regions=("whole", "centre_only", "border_only", "corners_only"),
    draws=run.bootstrap_draws,
)
files.write_csv(regions, run.run_dir / "tables" / "regions.csv")
cells = regions.assign(cell=[report.with_interval(row) for _, row in regions.iterrows()])
cells.pivot(index="region", columns="metric", values="cell").loc[
    list(dict.fromkeys(regions.region))
]


# %% [markdown]
# If the border alone is far above 0.5, no accuracy on this collection, however high, shows that a network reads lungs;
# only images of a hospital that sent both classes could. Keep that in mind for every number below.

# %% [markdown]
# ## 2 Two bugs, shown live
#
# **Scrambled features.** These networks end in a map of features [B, C, h, w]: C channels at h x w places. The published
# code pooled it with a window fixed for 32-pixel photographs, `avg_pool2d(8)`, and then called `view(-1, C)`. At 32
# pixels the map is 8 x 8, the window leaves one place, and the code is right. At the 320 pixels of that study the map is
# 80 x 80, the window leaves 10 x 10 places, and `view(-1, C)` turns each image into *100* rows. `cross_entropy` then
# complains that labels and rows do not match, and the author averaged the 100 answers of each image to make it stop.
# Below is the same at 80 pixels, where four rows come out.

# %%
def scrambled(maps, window):
    """The published line: maps [B,C,h,w] to rows of C numbers, as many as fit."""
    return F.avg_pool2d(maps, window).reshape(-1, maps.shape[1])


def folded(maps, window):
    """The published remedy: the average of an image's rows [B,C] (for a linear head, the average of
    its answers)."""
    return scrambled(maps, window).reshape(len(maps), -1, maps.shape[1]).mean(1)


study = open_study(run)
rows = study.rows("train")[:4]
four, truth, found = F.interpolate(study.images(rows), (80, 80)), study.labels(rows), []
for name in ("standard_wrn_28_10", "hat_wrn_34_10", "huang2021_wrn_34_r"):
    model = (
        robust.create(name, width=1 / 16).to(run.device).eval()
    )  # random weights: the bug is in the shapes
    maps = activations(model, four, models.last_map_layer(model))
    logits = model.head(scrambled(maps, 8))
    try:
        complaint = F.cross_entropy(logits, truth)
    except ValueError as error:
        complaint = error
    found.append(
        {
            "model": name,
            "map": "{} channels, {} x {} places".format(*maps.shape[1:]),
            "images": len(four),
            "rows, published": len(logits),
            "rows, pooled": len(model(four)),
            "cross_entropy": complaint,
        }
    )
pd.DataFrame(found)


# %% [markdown]
# **What is in such a row?** In memory the map lies channel after channel, each with its n = h x w places. A row of
# `view(-1, C)` is the next C numbers of that: *all places of the first few channels*. After the average over the n rows,
# "feature" j is the mean of n numbers from n different channels. The channels that the network learnt to tell apart are
# gone; what is left are blurred sums.
#
# The table compares those with the pooled features of the same frozen MobileNetV2: how many still resemble the feature
# whose place they took (correlation over images), and how well a logistic regression on them finds TB in validation
# images. (Its map is smaller than the window of 8, so the window is left out: n is the whole map.)

# %%
def read(network, images, fold=False):
    """Features [N,C] of normalised images [N,1,S,S] from a frozen MobileNetV2: pooled, or
    scrambled and folded."""
    parts = []
    with torch.no_grad():
        for part in images.split(64):
            maps = network.features(part.expand(-1, 3, -1, -1))
            parts.append(folded(maps, 1) if fold else maps.mean((2, 3)))
    return torch.cat(parts).cpu().numpy()


def fresh_probe():
    return make_pipeline(
        StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)
    )


def compared(study):
    """Pooled against scrambled features of one frozen network."""
    model, rng = build_model(run).eval(), np.random.default_rng(run.seed)
    rows = {part: rng.permutation(study.rows(part))[:600] for part in ("train", "val")}
    labels = {part: study.labels(rows[part]).cpu().numpy() for part in rows}
    tables, features = [], {}
    for kind, fold in (("pooled", False), ("scrambled, folded", True)):
        features[kind] = {
            part: read(model.backbone, model.normalize(study.images(rows[part])), fold)
            for part in rows
        }
        probe = fresh_probe().fit(features[kind]["train"], labels["train"])
        score = probe.predict_proba(features[kind]["val"])[:, 1]
        outcome = metrics.classification(
            labels["val"], score, study.patients(rows["val"]), draws=run.bootstrap_draws
        )
        tables.append(outcome.assign(features=kind))
    right, wrong = (StandardScaler().fit_transform(one["train"]) for one in features.values())
    likeness = (right * wrong).mean(0)[
        right.std(0) > 0
    ]  # a channel that never answers resembles nothing
    return pd.concat(tables).assign(
        median_r=np.median(likeness), kept=(likeness > 0.9).mean(), channels=len(likeness)
    )


study = open_study(run)
probes = stored(
    study,
    "scrambled",
    lambda: compared(study),
    uses=["width", "stages", "pretrained", "seed", "bootstrap_draws"],
)
first = probes.iloc[0]
print(
    f"of {first.channels:.0f} features, {first.kept:.1%} still resemble their own (r > 0.9);",
    f"median r = {first.median_r:.2f}",
)
probes = probes[probes.metric.isin(["auc", "balanced_accuracy", "sensitivity", "specificity"])]
probes = probes.assign(cell=[report.with_interval(row) for _, row in probes.iterrows()])
probes.pivot_table(index="features", columns="metric", values="cell", aggfunc="first", sort=False)


# %% [markdown]
# The probe need not lose much: the sums still carry exposure and layout, which is why nobody noticed. But they are not the
# features that were trained to withstand attacks, so nothing that is known of the robust models holds for them.
#
# **Statistics of a single image.** The same code standardised every *training* image by its own mean and deviation
# (`samplewise`), and *validation* images by the mean and deviation of a training set of which it had drawn one image
# (`featurewise`, `sample_size=1`). Its validation accuracy jumped between 0.22 and 0.86 from run to run. Here the probe is
# trained once, on images standardised one by one; then the validation images come in as in training, and as in that
# study, with each of twelve training images as the one that was drawn.

# %%
def standardised(images, like=None):
    """Images [N,1,S,S] by their own mean and deviation, or all by those of the image `like`
    [1,S,S]."""
    by = images if like is None else like[None]
    return (images - by.mean((1, 2, 3), keepdim=True)) / by.std((1, 2, 3), keepdim=True).clamp(
        min=1 / 255
    )


def one_image_statistics(study):
    """Validation scores of one probe, by the image whose statistics the validation images got."""
    network, rng = build_model(run).eval().backbone, np.random.default_rng(run.seed)
    rows = {
        part: rng.permutation(study.rows(part))[:n] for part, n in (("train", 600), ("val", 200))
    }
    labels = {part: study.labels(rows[part]).cpu().numpy() for part in rows}
    images = {part: study.images(rows[part]) for part in rows}
    probe = fresh_probe().fit(read(network, standardised(images["train"])), labels["train"])
    table = []
    for drawn in (None, *range(12)):
        seen = standardised(images["val"], None if drawn is None else images["train"][drawn])
        score = probe.predict_proba(read(network, seen))[:, 1]
        outcome = metrics.classification(labels["val"], score, study.patients(rows["val"]), draws=2)
        table.append(
            outcome.set_index("metric")["value"].rename(
                "own" if drawn is None else f"image {drawn}"
            )
        )
    return pd.DataFrame(table).rename_axis("statistics").reset_index()


study = open_study(run)
swing = stored(
    study,
    "one_image_statistics",
    lambda: one_image_statistics(study),
    uses=["width", "stages", "pretrained", "seed"],
).set_index("statistics")
swing = swing[["accuracy", "sensitivity", "specificity", "auc"]]
one = swing.drop(index="own")
pd.DataFrame(
    {
        "each image's own, as in training": swing.loc["own"],
        "one image's: lowest of 12": one.min(),
        "median": one.median(),
        "highest": one.max(),
    }
).round(3)


# %% [markdown]
# Neither can happen here: models take pixels in [0, 1], own their normalisation, pool by the mean over the map and give
# one row an image at any size (tests hold them to it), and training, test and attack use the same door. In the published
# code the attack also cut the *standardised* images to [0, 1], and so lost all that was darker than an image's average.

# %% [markdown]
# ## 3 Training
#
# | model | what is trained |
# |---|---|
# | standard | MobileNetV2, cross-entropy; a TB image weighs as much as five normal ones |
# | pgd_at | the same on attacked images (Madry et al., [1706.06083](https://arxiv.org/abs/1706.06083)); epoch chosen under attack |
# | linear_probe | a new last layer on frozen ImageNet features |
# | robust models | a new last layer on frozen features of the literature's robust models (GPU; names in the setting `zoo`) |
#
# Class weights, not accuracy: both classes count the same in the loss and in the choice of the epoch. A model that
# never says "TB" would otherwise look good and, since it cannot be changed, perfectly robust.

# %%
def train_standard(study):
    return train_model(
        study, "standard", objectives.cross_entropy(weight=study.class_weights()), monitor="val_auc"
    )


def train_pgd_at(study):
    loss = objectives.pgd_adversarial(
        eps=run.at_eps, steps=run.at_steps, step_size=run.at_step_size, weight=study.class_weights()
    )
    return train_model(study, "pgd_at", loss, **choose_under_attack(study))


def train_linear_probe(study):
    model = models.with_head(build_model(run), head=run.head, seed=run.seed)
    return train_head(
        study, "linear_probe", model, objectives.cross_entropy(weight=study.class_weights())
    )


# %%
study = open_study(run)
print("starting weights:", weights_label(run))
makers = {"pgd_at": train_pgd_at, "standard": train_standard, "linear_probe": train_linear_probe}
fitted = launch.each(lambda name: makers[name](study), list(makers), log_dir=run.run_dir / "logs")
done = [
    {
        "model": name,
        "epochs": len(one.history),
        "best epoch": one.best_epoch,
        "best score": one.best_score,
        "minutes": one.seconds / 60,
    }
    for name, one in fitted.items()
]
display(pd.DataFrame(done).round(3))
histories = {
    name: pd.read_csv(run.run_dir / name / "metrics.csv") for name in ("standard", "pgd_at")
}
figure = plots.figure_history(histories, run.caption)
report.save_figure(figure, run, "training")
figure

# %% [markdown]
# **The robust models**: a checkpoint must fit key by key, the body is frozen *in eval mode* (else its batch norms would
# drift to the new images, as they did in the original), and a MeanSparse model gets the statistics of the training images
# and the width of its dead zone on validation images.

# %%
ZOO_USES = (
    "zoo_weights",
    "zoo_width",
    "zoo_epochs",
    "zoo_alphas",
    "head",
    "headline_eps",
    "pgd_steps",
    "seed",
    "batch_size",
    "lr",
    "schedule",
    "patience",
    "balance",
    "attack_batch",
)


def train_robust_model(name):
    study = study_of(name)
    folder = work_folder(run, name, study.key | run.pick(*ZOO_USES))
    if (folder / "checkpoint.txt").exists() and run.resume:
        return (folder / "checkpoint.txt").read_text(encoding="utf-8")
    try:
        body = robust.create(name, width=run.zoo_width, pretrained=run.zoo_weights, seed=run.seed)
    except RuntimeError as error:
        return f"left out: {error}"
    model = models.with_head(body.to(run.device), head=run.head, seed=run.seed)
    rows, val = study.rows("train"), study.rows("val")
    batches = [
        rows[start : start + run.attack_batch] for start in range(0, len(rows), run.attack_batch)
    ]
    sparse = "meansparse" in name
    if sparse:  # the head must learn from features of these images, not of CIFAR-10's statistics
        robust.recompute_statistics(model, map(study.images, batches))
    train_head(study, name, model, objectives.cross_entropy(weight=study.class_weights()))
    if sparse:
        table = select_alpha(
            model,
            map(study.images, batches),
            study.images(val),
            study.labels(val),
            grid=run.zoo_alphas,
            eps=run.headline_eps,
            steps=run.pgd_steps,
            seed=run.seed,
        )
        files.write_csv(table, folder / "alpha.csv")
        models.save(
            model,
            folder / "best.pt",
            meta={"alpha": float(table.loc[table.chosen, "alpha"].item())},
        )
    files.write_text(
        run.zoo_weights or "random", folder / "weights.txt"
    )  # what result rows will say
    files.write_text(str(body.load_report or "random weights"), folder / "checkpoint.txt")
    return (folder / "checkpoint.txt").read_text(encoding="utf-8")


if not run.zoo:
    print(
        "None in this profile: they are no work for a laptop. On Kaggle, with internet and a GPU, "
        "PROFILE = 'full'."
    )
else:
    study_of(run.zoo[0])  # decode once, before processes share the images
loaded = launch.each(train_robust_model, list(run.zoo), log_dir=run.run_dir / "logs")
pd.DataFrame(loaded.items(), columns=["model", "checkpoint"])


# %% [markdown]
# ## 4 Sensitivity first
#
# A screening test has to find the sick; a false alarm costs a second examination. So the threshold is not the customary
# 0.5 but the highest that still finds the wanted share of TB (setting `sensitivity`), and it is chosen on **validation**
# images, before the test split is opened. Whether it keeps that promise on images it was not chosen on, the test shows.

# %%
def operating_point(study, name):
    """The highest threshold on P(TB) that finds the wanted share of the validation split's TB
    images."""
    rows = study.rows("val")
    model = load_models(study, [name])[name]
    labels, score = (
        study.labels(rows).cpu().numpy(),
        train.predict(model, study.torch_set("val"))[0][:, 1],
    )
    sick = np.sort(score[labels == 1])[::-1]
    last = sick[
        int(np.ceil(run.sensitivity * len(sick))) - 1
    ]  # the least suspicious image that must be found
    threshold = (
        last + score[score < last].max(initial=0.0)
    ) / 2  # half-way to the next image below it
    called = score > threshold
    return pd.DataFrame(
        [
            {
                "threshold": threshold,
                "sensitivity": called[labels == 1].mean(),
                "specificity": 1 - called[labels == 0].mean(),
                "TB images": len(sick),
            }
        ]
    )


study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
points = {
    name: stored(
        study_of(name),
        f"operating_{name}",
        lambda n=name: operating_point(study_of(n), n),
        model=name,
        uses=["sensitivity"],
    )
    for name in names
}
print(f"thresholds for a sensitivity of {run.sensitivity:g}, on validation images")
pd.concat(points).droplevel(1).rename_axis("model").round(4)

# %% [markdown]
# **The test split is opened here**, after every choice has been made. Both thresholds, with intervals.

# %%
study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
test_opened(study, "clean metrics of all models at two thresholds")
rows = study.rows("test")
labels, patients = study.labels(rows).cpu().numpy(), study.patients(rows)
probabilities, clean = {}, []
for name in names:
    own = study_of(name)
    model = load_models(own, [name])[name]
    probabilities[name] = train.predict(model, own.torch_set("test"))[0][:, 1]
    chosen = stored(own, f"operating_{name}", model=name, section="4 Sensitivity first")[
        "threshold"
    ].item()
    for at, attack in ((0.5, "clean"), (chosen, "clean, chosen threshold")):
        outcome = metrics.classification(
            labels, probabilities[name], patients, threshold=at, draws=run.bootstrap_draws
        )
        clean.append(report.result_rows(outcome, own.run, model=name, attack=attack))
clean = pd.concat(clean)
report.update_results(clean, RESULTS)
predictions = study.dataset.manifest.loc[rows, ["path", "label"]].assign(**probabilities)
files.write_csv(predictions, run.run_dir / "predictions.csv")
table = clean.assign(
    cell=[report.with_interval(row) for _, row in clean.iterrows()],
    threshold=np.where(clean.attack.eq("clean"), "0.5", "chosen"),
)
table.pivot_table(
    index=["model", "threshold"], columns="metric", values="cell", aggfunc="first", sort=False
)[["sensitivity", "specificity", "balanced_accuracy", "accuracy", "auc"]]

# %% [markdown]
# **What a positive answer is worth.** An AUC does not know how rare the disease is. The precision-recall curve does:
# its area (AUPRC) starts from the share of TB among the images, not from 0.5. And that share, one in six, is the
# collection's and nobody's clinic. The last columns turn sensitivity and specificity at the chosen threshold into the
# share of true TB among positive answers, here and where one person in a hundred is sick.

# %%
study = open_study(run)
predictions = pd.read_csv(made_by(run, "predictions.csv", "4 Sensitivity first"))
labels, share = predictions["label"].to_numpy(), predictions["label"].mean()
weights = metrics.patient_weights(
    study.patients(study.rows("test")), draws=min(run.bootstrap_draws, 500)
)
results, worth = pd.read_csv(made_by(run, "results.csv", "4 Sensitivity first")), []
curves = {}
for name in predictions.columns[2:]:
    score = predictions[name].to_numpy()
    drawn = [
        average_precision_score(labels, score, sample_weight=w)
        for w in weights
        if w[labels == 1].any()
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    area = {
        "metric": "auprc",
        "value": average_precision_score(labels, score),
        "ci_low": low,
        "ci_high": high,
        "n": len(labels),
    }
    report.update_results(
        report.result_rows(pd.DataFrame([area]), study_of(name).run, model=name), RESULTS
    )
    own = results[results.model.eq(name) & results.attack.eq("clean, chosen threshold")].set_index(
        "metric"
    )["value"]
    hit, alarm = own["sensitivity"], 1 - own["specificity"]
    precision = {at: hit * at / (hit * at + alarm * (1 - at)) for at in (share, 0.01)}
    worth.append(
        {
            "model": name,
            "AUPRC": report.with_interval(area),
            f"precision at {share:.0%} TB": precision[share],
            "precision at 1 % TB": precision[0.01],
        }
    )
    found, recall, threshold = precision_recall_curve(labels, score)
    curve = pd.DataFrame({"threshold": threshold, "precision": found[:-1], "recall": recall[:-1]})
    curves[name] = curve.assign(
        f1=2 * curve.precision * curve.recall / (curve.precision + curve.recall)
    )
figure = figure_pr(curves, run.caption)
figure.axes[0].axhline(share, color="0.4", ls=":")  # what guessing gives
report.save_figure(figure, run, "precision_recall")
display(pd.DataFrame(worth).set_index("model").round(3))
figure

# %% [markdown]
# ## 5 Attacks
#
# The suite of notebooks 01 and 02: noise, FGSM, PGD and APGD with two losses (for MeanSparse also straight through its
# operator), the searches for the smallest change, and Square, which sees no gradient; eps in grey levels of 255. The
# **worst case** counts an image as right only if none of them fooled it at this or a smaller eps. First at the models'
# own threshold of 0.5, for the table in the form of the published study.

# %%
study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
test_opened(study, "the suite of attacks in pixel units")


def attacked(name):
    return suite.attack(study_of(name), name).rows


found = []
for name, per_image in launch.each(attacked, names, log_dir=run.run_dir / "logs").items():
    own = study_of(name)
    report.update_results(report.accuracy_rows(per_image, own, model=name), RESULTS)
    directions = report.direction_rows(per_image, own, model=name, eps=run.headline_eps)
    results = report.update_results(directions, RESULTS)
    found.append(report.accuracy_rows(per_image[per_image.label.eq(1)], own, model=name))
report.attack_table(results, eps=run.headline_eps)

# %% [markdown]
# Sensitivity against eps: what is left of finding TB. A model that calls everything TB keeps it at 1, so read it together
# with the specificity in the table.

# %%
figure = plots.figure_accuracy_vs_eps(
    pd.concat(found), run.caption, attack="worst", note="Images with TB only, worst case"
)
figure.axes[0].set_ylabel("sensitivity")
report.save_figure(figure, run, "sensitivity_vs_eps")
figure


# %% [markdown]
# **The TB images that an attack hides.** A clinic would run the model at the threshold of section 4, so that is where the
# price has to be counted. `at_threshold` moves the decision into the last bias; the attacks then aim at the very
# decision that would be used. Only the images with TB are attacked: how many are missed before, and after?

# %%
def at_threshold(model, threshold):
    """The model, changed so that its argmax is class 1 exactly where P(class 1) > threshold."""
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias[1] -= np.log(threshold / (1 - threshold))
    return model


study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
test_opened(study, "images with TB attacked at the chosen threshold")


def hidden(name):
    own = study_of(name)
    chosen = stored(own, f"operating_{name}", model=name, section="4 Sensitivity first")[
        "threshold"
    ].item()
    rows = own.rows("test")[own.labels(own.rows("test")).cpu().numpy() == 1]
    model = at_threshold(load_models(own, [name])[name], chosen)
    options = suite.options(run) | {"at": None}  # at its only eps every attack is run
    return stored(
        own,
        f"hidden_{name}",
        lambda: (
            evaluate.robust(
                model, (own.images(rows), own.labels(rows)), [run.headline_eps], **options, ids=rows
            ).rows
        ),
        model=name,
        uses=(*suite.USES, "headline_eps", "sensitivity"),
    )


missed = []
for name, per_image in launch.each(hidden, names, log_dir=run.run_dir / "logs").items():
    found = report.accuracy_rows(per_image, study_of(name), model=name).set_index(
        "attack"
    )  # of TB images: sensitivity
    rows = (
        found.loc[["worst"]]
        .reset_index()
        .assign(metric="sensitivity", attack="worst, chosen threshold")
    )
    report.update_results(rows, RESULTS)
    count = (
        per_image[per_image.fooled.astype(bool)]
        .groupby("attack")
        .size()
        .reindex(["clean", "worst"], fill_value=0)
    )
    missed.append(
        {
            "model": name,
            "TB images": int(found.loc["worst", "n"]),
            "missed, clean": count["clean"],
            f"missed, worst case {eps_text(run.headline_eps)}": count["worst"],
            "sensitivity, worst case": report.with_interval(found.loc["worst"]),
        }
    )
pd.DataFrame(missed).set_index("model")

# %% [markdown]
# **Masked gradients**: the check list of Carlini et al. ([1902.06705](https://arxiv.org/abs/1902.06705)), as checks that
# can fail. A WARN is a finding about the *evaluation* of that model: do not believe its robustness before you know why.

# %%
study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
shares, checks = {}, []
for name in names:
    own = study_of(name)
    model, rows = load_models(own, [name])[name], own.rows("test")
    table = stored(
        own,
        f"zero_gradients_{name}",
        lambda m=model, o=own, r=rows: pd.DataFrame(
            {
                "share": [
                    evaluate.zero_gradient_share(
                        m, o.images(r), o.labels(r), batch_size=run.attack_batch
                    )
                ]
            }
        ),
        model=name,
        uses=["attack_batch"],
    )
    shares[name] = table["share"].item()
    checks.append(stored(own, f"checks_{name}", model=name, section="5 Attacks").assign(model=name))
results = report.update_results(report.zero_gradient_rows(shares, study), RESULTS)
checks = pd.concat(checks)
warned = checks.loc[checks["verdict"].eq("WARN"), ["model", "check", "value"]]
print(f"{len(checks) - len(warned)} of {len(checks)} checks passed")
with pd.option_context("display.max_colwidth", 300):
    display(warned.reset_index(drop=True))
report.masking_table(results, eps=run.headline_eps).round(3)

# %% [markdown]
# ## 6 Where do they look?
#
# Maps for the class *Tuberculosis* on TB images of the **test** split, of the plain and of the adversarially trained
# model. The collection marks no findings, so the maps cannot be scored here (notebook 02 does it, on fractures): take
# them as a question, not as evidence. One thing to look for: heat outside the lungs, where section 1 found what it
# found.

# %%
study = open_study(run)
test_opened(study, "maps of TB images")
rows = study.rows("test")[study.labels(study.rows("test")).cpu().numpy() == 1][:3]
for name in ["standard", "pgd_at"]:
    model, x = load_models(study, [name])[name], study.images(rows)
    options = {
        "saliency": {},
        "integrated_gradients": {"steps": run.integrated_steps},
        "gradcam": {"layer": models.last_map_layer(model)},
    }
    found = {
        method: attribution.explain(method, model, x, 1, **extra)
        for method, extra in options.items()
    }
    print(
        f"{name}: completeness error of integrated gradients, at most "
        f"{found['integrated_gradients'].error.max():.4f}"
    )
    score = train.predict(model, x)[0][:, 1]
    figure = figures.figure_overlays(
        x.cpu().numpy(),
        {method: one.heat().cpu().numpy() for method, one in found.items()},
        captions=[f"{name}\nP(TB) {p:.2f}" for p in score],
        caption=run.caption,
    )
    report.save_figure(figure, run, f"overlays_{name}")
    display(figure)

# %% [markdown]
# **Does the map depend on the model at all?** From the last layer down, the weights are replaced by noise (Adebayo et al.,
# [1810.03292](https://arxiv.org/abs/1810.03292)); a map that explains the model must change.

# %%
study = open_study(run)
model = load_models(study, ["standard"])["standard"]
x = study.images(study.rows("test")[study.labels(study.rows("test")).cpu().numpy() == 1][:6])
randomised = {}
for method, extra in {"saliency": {}, "gradcam": {"layer": models.last_map_layer(model)}}.items():
    randomised[method] = stored(
        study,
        f"randomised_{method}_standard",
        lambda m=method, e=extra: localisation.sanity(
            model, x, m, target=1, steps=4, seed=run.seed, **e
        ),
        model="standard",
        uses=["maps", "occlusion_window", "seed"],
    )
figure = figures.figure_randomisation(randomised, run.caption)
report.save_figure(figure, run, "randomised")
figure

# %% [markdown]
# ## 7 Verdict
#
# Every model against the plain one on the *same* images (McNemar's exact test by patient, with Holm's adjustment), clean
# and in the worst case; then the images with TB. The sentences are written by code from this run's numbers, so that they cannot claim more than it shows.

# %%
study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
per_image = {
    name: stored(study_of(name), f"robust_{name}", model=name, section="5 Attacks")
    for name in names
}
paired = report.paired_tests(per_image, study, eps=run.headline_eps, reference="standard")
files.write_csv(paired, run.run_dir / "paired_tests.csv")
results = pd.read_csv(made_by(run, "results.csv", "5 Attacks"))
masking = report.masking_table(results, eps=run.headline_eps)
display(Markdown(report.verdict(results, masking, paired, run, reference="standard")))
lines = [f"At thresholds chosen for a sensitivity of {run.sensitivity:g} on validation images:\n"]
for name in names:
    # Without rows of one key: pandas 2 gives a table for a key as soon as any other occurs twice.
    own = (
        results[results.model.eq(name)]
        .drop_duplicates(["attack", "metric"])
        .set_index(["attack", "metric"])
    )
    hit, spared = (
        own.loc[("clean, chosen threshold", metric)] for metric in ("sensitivity", "specificity")
    )
    held = own.loc[("worst, chosen threshold", "sensitivity")]
    blind = (hit["value"] + spared["value"]) / 2 < 0.6
    remark = " Hardly better than guessing: neither number means anything." if blind else ""
    lines.append(
        f"- **{name}** finds {report.with_interval(hit)} of the {held['n']:.0f} test images with "
        "TB, with false "
        f"alarms on {1 - spared['value']:.1%} of the healthy; under attack at "
        f"{eps_text(run.headline_eps)} it still finds {report.with_interval(held)}.{remark}"
    )
Markdown("\n".join(lines))

# %% [markdown]
# ## Results and files

# %%
results = pd.read_csv(made_by(run, "results.csv", "5 Attacks"))
keep = results.attack.isin(["clean", "worst"]) & (
    results.eps.eq(0) | np.isclose(results.eps, run.headline_eps)
)
display(report.results_table(results[keep]))
written = sorted(
    p.relative_to(run.run_dir).as_posix() for p in run.run_dir.rglob("*") if p.is_file()
)
print(f"{len(written)} files in {run.run_dir.parent.name}/{run.run_dir.name}:")
print("\n".join(name for name in written if not name.startswith(("tables/", "suite/"))))
