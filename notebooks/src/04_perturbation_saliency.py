# %% [markdown]
# # 04 Perturbations and saliency drift: does a moving map warn of a wrong answer?
#
# Add a little noise to a chest image and the heat map that "explains" the network's answer moves. Often the answer stays.
# It is tempting to read the movement as a warning: *the explanation is unstable, so do not trust the answer*. A Master's
# thesis measured both sides, how far maps move and how much the AUC falls, and put them into scatter plots; it never
# computed whether one foretells the other. This notebook repeats its measurements without the slips that corrupted them, and
# answers the question with a number and an interval.
#
# **What you get**
#
# | part | question |
# |---|---|
# | 1 Data | Which images, and what do fourteen ways of corrupting them look like in five severities? |
# | 2 Training | ResNet-18 and MobileNetV2, each trained on clean images and on images corrupted at random |
# | 3 Accuracy | How far do AUC and accuracy fall, and what does training on corrupted images buy, also for damage it never saw? |
# | 4 Maps | How far do saliency, Grad-CAM and Grad-CAM++ move, layer by layer, between a floor and a ceiling? |
# | 5 As in the thesis | The fall of the AUC against the movement of the maps |
# | 6 The question | Image by image: does drift tell wrong answers from right ones, and better than the network's own doubt? |
# | 7 Results | Tables, the thesis' CSV files, time and memory |
#
# What came out on the real images stands in [results/README.md](../results/README.md); the outputs stored in this file are from the
# smoke profile on *synthetic* images with tiny networks, and only show what you will see.
#
# *For research and teaching. Not a medical device.*

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"  # "smoke" (a minute), "cpu" (a laptop, about two hours), "full" (GPU), or "auto"
DATA_DIR = ""  # empty: find it; else the folder that holds it, or your own: one of class folders
RUN_NAME = ""  # empty: profile and kind of data
RESUME = True  # True: go on where a run stopped; False: anew; "force": under other settings
CHANGES = {}  # settings of your own, such as {"dataset": "covid"} or {"epochs": 5}

# %% [markdown]
# **The settings.** FULL is the whole study; CPU and SMOKE are what is smaller on a laptop and in a first look. To change
# one, whatever the profile, write it into `CHANGES` above: `CHANGES = {"epochs": 5}`. A typo is told, a changed setting
# is starred below, and the run gets a folder of its own, which takes over whatever the change does not touch.
#
# **Your own images**: `DATA_DIR` may be any folder with a folder of images for each class (below `train`, `val` and
# `test` if you have a split). A CSV in it with the columns `file` and, as you have them, `label`, `patient`, `split`
# says more. Without patients every image counts as one: `patient_pattern` reads them from the file names.

# %% tags=["settings"]
# The data; size is that of the CIFAR-style ResNet-18, whose maps end at an eighth of it
FULL = {"dataset": "pneumonia", "seed": 0, "size": 128, "fit": "squash", "per_class": None}
FULL |= {"val_share": 0.15}
FULL |= {"test_share": None, "unusable_share": 0.0, "classes": None, "patient_pattern": ""}
# The two networks: the ResNet starts from scratch, as in the thesis, MobileNetV2 from ImageNet if
# pretrained
FULL |= {"width": 1.0, "mobilenet_size": 224, "mobilenet_width": 1.0, "stages": 7}
FULL |= {"pretrained": True}
# The recipe of every training; max_minutes is for one model, None is no limit
FULL |= {"epochs": 30, "mobilenet_epochs": 15, "batch_size": 64, "lr": 1e-3, "schedule": "onecycle"}
FULL |= {"monitor": "val_auc"}
FULL |= {"patience": None, "max_minutes": 120.0, "num_workers": 2}
# The corruptions: those that the augmented trainings see, all that are measured, those whose maps
# are compared
THESIS = ("gaussian_noise", "speckle_noise", "motion_blur", "contrast", "brightness")
RADIOGRAPHS = ("shot_noise", "poisson_dose", "scatter_veil", "collimation", "marker", "grid_lines")
FULL |= {"scale": "imagenet-c", "trained_on": THESIS, "severities": (1, 2, 3, 4, 5)}
FULL |= {"corruptions": THESIS + RADIOGRAPHS + ("resampling", "bit_depth", "jpeg")}
FULL |= {"mapped": THESIS + ("poisson_dose", "scatter_veil", "collimation")}
# The maps: validation images that choose the predictor, test images that it is measured on (None:
# all)
FULL |= {"choose_images": 200, "map_images": None, "map_batch": 32, "bootstrap_draws": 2000}

# %% tags=["settings"]
CPU = {"size": 64, "width": 0.5, "mobilenet_size": 112, "epochs": 8, "mobilenet_epochs": 5}
CPU |= {"batch_size": 32}
CPU |= {"num_workers": 0, "mapped": THESIS + ("poisson_dose",), "choose_images": 150}

# width: not 1/8, for with 8 channels, channels-last, torch 2.14 crashes in the backward pass on
# some CPUs
SMOKE = {"size": 48, "per_class": 96, "width": 0.1875, "mobilenet_size": 48, "mobilenet_width": 0.5}
SMOKE |= {
    "stages": 3,
    "pretrained": "phantom",
    "epochs": 12,
    "mobilenet_epochs": 12,
    "batch_size": 16,
}
SMOKE |= {"lr": 3e-3, "monitor": "val_loss"}
SMOKE |= {"num_workers": 0, "max_minutes": None}
SMOKE |= {"corruptions": THESIS + ("poisson_dose", "collimation")}
SMOKE |= {"mapped": THESIS, "severities": (1, 3, 5), "choose_images": 16, "map_images": 24}
SMOKE |= {"bootstrap_draws": 200}
# any other data: a test split is drawn where there is none
OTHER = {"test_share": 0.15, "unusable_share": 0.01}

# %% tags=["start"]
from dlia_utils.run import start

run = start(
    "04_perturbation_saliency",
    dict(full=FULL, cpu=CPU, smoke=SMOKE),
    dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES),
    by_data={"pneumonia": {}, "*": OTHER},
    allowed={name: FULL["corruptions"] for name in ("corruptions", "mapped", "trained_on")}
    | {"pretrained": ("phantom",)},
    own_data="any",
    trains="2 Training, with and without corrupted images",
)
print(run)

# %% tags=["imports"]
import re  # noqa: I001 (one line a module keeps this cell readable)
import time
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
from IPython.display import Markdown, display
from sklearn.metrics import roc_auc_score

from dlia_utils.data import augment, datasets
from dlia_utils import plots
from dlia_utils import corrupt, corruption_error, files, models, objectives, report
from dlia_utils.data import split
from dlia_utils.explain import drift, figures, warning
from dlia_utils.study import (
    fit_model,
    load_models,
    made_by,
    open_study,
    build_model,
    stored,
    test_opened,
)
from dlia_utils.study import train_model

RESULTS = run.run_dir / "results.csv"

# %% [markdown]
# **Your model here.** One line puts any convolutional network with a logit a class into every table and figure below: a
# function that *builds* one is trained twice, plainly and on corrupted images; a network that is *trained already* is taken
# as it is, and stands for both. `models.wrap` puts its normalisation inside, so that images enter in [0, 1].

# %% tags=["yours"]
# run.own["resnet34"] = lambda: models.backbone("resnet34", num_classes=2)
# run.own["mine"] = models.wrap(my_trained_network, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224,
# 0.225])
PAIRS = {
    name: f"{name}_augmented" for name in ("resnet18", "mobilenet_v2", *run.own)
}  # plain, and on corrupted images
run.own.update({PAIRS[name]: own for name, own in list(run.own.items()) if name in PAIRS})
MODELS = [name for pair in PAIRS.items() for name in pair]


# %% [markdown]
# **What the sections share.**

# %% tags=["yours"]
def study_of(name, study):
    """The study at the size that this network reads; images, rows and split are the same."""
    if not name.startswith("mobilenet_v2"):
        return study
    own = dict(size=run.mobilenet_size, width=run.mobilenet_width, epochs=run.mobilenet_epochs)
    return study.variant(**own)


@contextmanager
def tracked(label):
    """Time and memory of a step: one more line of resources.csv in the run folder."""
    wall, cpu, path = time.perf_counter(), time.process_time(), run.run_dir / "resources.csv"
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    yield
    row = {"step": label, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    row["memory_mib"] = psutil.Process().memory_info().rss / 2**20
    row["gpu_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20 if gpu else np.nan
    pd.DataFrame([row]).round(1).to_csv(path, mode="a", header=not path.exists(), index=False)


# %% tags=["yours"]
def measured(name, study, part, rows, **options):
    """Predictions (and drift of maps) of the images `rows`, clean and corrupted, once in a run."""
    found = []

    def table(number):
        if not found:
            own, model = study_of(name, study), load_models(study, [name])[name]
            grid = {name: run.settings[name] for name in ("severities", "seed", "scale")} | options
            with tracked(f"{part} {name}"):
                images = own.images(rows), own.labels(rows), rows
                seen, moved = drift.measure(model, *images, batch_size=run.map_batch, **grid)
            found.extend(
                [seen, moved.astype(dict.fromkeys(drift.SIGN, "float32"))]
            )  # half the digits
        return found[number]

    kinds = ["predictions", "drift"] if options.get("methods") != () else ["predictions"]
    more = {
        "test": ["corruptions"],
        "maps_test": ["mapped", "map_images"],
        "maps_val": ["mapped", "choose_images"],
    }
    given = {"model": name, "uses": ["severities", "seed", "scale", *more[part]]}
    own = study_of(name, study)
    return [
        stored(own, f"{part}_{kind}_{name}", lambda n=n: table(n), **given)
        for n, kind in enumerate(kinds)
    ]


def maps_of(name, study, part="test"):
    """The predictions and the drift that section 4 has measured."""
    own, section = study_of(name, study), "4 How far do the maps move?"
    return [
        stored(own, f"maps_{part}_{kind}_{name}", model=name, section=section)
        for kind in ("predictions", "drift")
    ]


def some_images(study, part, count):
    """`count` images of a split, drawn once and for all; None: all of them."""
    return np.sort(np.random.default_rng(run.seed).permutation(study.rows(part))[:count])


# %% [markdown]
# ## 1 The images, and fourteen ways to corrupt them
#
# **The data** is *Chest X-Ray Images (Pneumonia)* unless you say otherwise: `CHANGES = {"dataset": "covid"}` above takes any classification set of the
# suite, and every 2-D set of MedMNIST, whose file (for example `pneumoniamnist_64.npz`) is found like any other data set.
# The original study took its validation images from the training set. Here validation is drawn by patient, and the
# test images stay closed until everything is chosen.

# %%
study = open_study(run)
print(study.dataset.split_rule)
display(datasets.summary(study.dataset))
pd.set_option("display.max_colwidth", 100)
split.audit(study.dataset)

# %% [markdown]
# **The corruptions.** Five are the thesis': Gaussian noise, speckle, motion blur, contrast and brightness, in the five
# severities of ImageNet-C ([1903.12261](https://arxiv.org/abs/1903.12261)). Nine more are what happens to radiographs: less
# dose, scattered light, blades of the collimator, a burnt-in letter, a grid that stood still, coarse pixels, few grey
# levels, JPEG. Three rules keep the comparison clean, and the first is where the original went wrong: there, clean images
# lay in [-1, 1] and corrupted ones in [0, 1], so that every difference also measured a shift of the range.
#
# 1. Clean and corrupted images are in [0, 1], and the network does the rest itself.
# 2. What is drawn for an image depends on its row, the corruption and the seed, never on its neighbours in a batch.
# 3. Severities of one image differ in strength only: the noise pattern and the angle of the blur stay.

# %%
study = open_study(run)
image = study.rows("train")[study.labels(study.rows("train")).cpu().numpy() == 1][0]
own, steps, lines = study_of("mobilenet_v2", study), (0, *run.severities), []
for name in run.corruptions:
    options = {"seed": run.seed, "ids": [image], "scale": run.scale}
    seen = [corrupt.apply(name, own.images([image]), step, **options)[0] for step in steps]
    titles = [f"severity {step}" if step else "clean" for step in steps]
    titles = titles if not lines else [""] * len(steps)  # above the first line
    pictures = [figures.Picture(*pair) for pair in zip(titles, seen, strict=True)]
    lines.append((name.replace("_", " "), pictures))
figure = figures.figure_grid(lines, f"scale {run.scale}, {own.run.caption}")
report.save_figure(figure, run, "corruptions")
figure


# %% [markdown]
# ImageNet-C's scale is harsh for radiographs, and at the right end a reader would send the image back. That is intended:
# the question is whether anything *warns*, and a warning can only be judged where things go wrong.

# %% [markdown]
# ## 2 Training, with and without corrupted images
#
# Two networks: the thesis' **ResNet-18** in its form for small images (no pooling at the start, so that the maps stay
# large), from scratch; and **MobileNetV2** from ImageNet weights where they can be had. Each is trained twice, with the
# same flips, shifts and zooms, the same epochs and the same start:
#
# - *plain*: on clean images;
# - *augmented*: every image in every epoch is left clean or corrupted by one of the thesis' five corruptions at a random
#   severity, all six alike. (The thesis put thirty copies of every image into memory; a fresh draw in each epoch
#   shows the same images without that.)
#
# Both keep the epoch with the best AUC on the *clean* validation images.

# %%
def build(name, study):
    """A fresh network, the same start for both trainings."""
    count = len(study.dataset.classes)
    if name.startswith("resnet18"):
        return models.resnet18_cifar(num_classes=count, width=run.width, seed=run.seed).to(
            run.device
        )
    return build_model(study.run, classes=count)


def train_set_of(name, study):
    """Flips, shifts and zooms for both; grey values are changed by the corruptions alone."""
    images = study.torch_set("train", augmented=augment.train_transform(exposure=0, blur=0))
    if not name.endswith("augmented"):
        return images
    return corrupt.TrainAugmentor(images, names=run.trained_on, seed=run.seed, scale=run.scale)


def fit(name, study):
    own = study_of(name, study)
    loss = objectives.cross_entropy(weight=own.class_weights())
    if name in run.own:
        return train_model(own, name, loss, train_set=train_set_of(name, own), monitor=run.monitor)
    fitted = fit_model(
        own,
        name,
        build(name, own),
        loss,
        train_set_of(name, own),
        own.torch_set("val"),
        schedule=run.schedule,
        monitor=run.monitor,
    )
    if name.startswith("resnet18"):
        files.write_text("random", run.run_dir / name / "weights.txt")  # what result rows will say
    return fitted


# %%
study = open_study(run)
rows = []
for name in MODELS:
    with tracked(f"training {name}"):
        fitted = fit(name, study)
    best = fitted.history.set_index("epoch").reindex([fitted.best_epoch]).iloc[0]
    rows.append(
        {
            "model": name,
            "size": study_of(name, study).run.size,
            "epochs": len(fitted.history),
            "best epoch": fitted.best_epoch,
            "val AUC": best["val_auc"],
            "val accuracy": best["val_accuracy"],
            "minutes": fitted.seconds / 60,
        }
    )
pd.DataFrame(rows).round(3)

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
# ## 3 How far does accuracy fall?
#
# The test images are opened here. Every one of them is seen clean and through each corruption at each severity by all
# four networks. What is counted:
#
# - **AUC** clean and corrupted, and their difference, the thesis' $\Delta$AUC. Both are resampled on the same patients, so
#   that the interval is that of the *difference*.
# - **mCE**, the mean corruption error: for each corruption the error summed over the severities, divided by that of a
#   reference, then the mean. ImageNet-C refers to AlexNet; here it is the plainly trained network, so that *below 1*
#   reads "better than plain training". The error is 1 - balanced accuracy, since classes are of unequal size. The
#   **relative** mCE counts only what is lost against clean images.

# %%
study = open_study(run)
test_opened(study, "predictions under corruption")
rows = study.rows("test")
patients = pd.Series(study.patients(rows), index=rows)
predictions = {
    name: measured(name, study, "test", rows, names=run.corruptions, methods=())[0]
    for name in MODELS
}
grids = {
    name: corruption_error.grid(table, patients, draws=run.bootstrap_draws)
    for name, table in predictions.items()
}
for name, grid in grids.items():
    made = report.result_rows(
        corruption_error.metric_rows(grid), study_of(name, study).run, model=name
    )
    report.update_results(made, RESULTS)
clean = {name: report.with_interval(grid.iloc[0]) for name, grid in grids.items()}
worst = {name: grid.loc[grid["value"].idxmin()] for name, grid in grids.items()}
pd.DataFrame(
    {
        "clean AUC": clean,
        "lowest AUC": {name: report.with_interval(row) for name, row in worst.items()},
        "under": {name: f"{row['corruption']} {row['severity']}" for name, row in worst.items()},
    }
)

# %% [markdown]
# The same in one picture: a panel for each corruption, severity to the right. Where the two lines of a network lie apart,
# training on corrupted images changed something; the first five panels are what that training had seen.

# %%
for plain, augmented in PAIRS.items():
    pair = {name: grids[name] for name in (plain, augmented)}
    figure = figures.figure_auc_lines(pair, study_of(plain, study).run.caption)
    report.save_figure(figure, run, f"auc_{plain}")
    display(figure)

# %% [markdown]
# AUC asks whether the images are still *ranked* right, accuracy whether the answers are still right at the threshold that
# was fixed on clean images. A corruption can leave the ranking nearly untouched and push all images to one side. So the
# errors below are counted at the fixed threshold, apart for corruptions the augmented training had seen and others.

# %%
seen = [name for name in run.corruptions if name in run.trained_on]
kinds = {
    "seen in training": seen,
    "not seen": [name for name in run.corruptions if name not in seen],
}
words = {"error": "error (1 - balanced accuracy)", "ce": "mCE", "relative_ce": "relative mCE"}
cells = []
for plain, augmented in PAIRS.items():
    for kind, names in kinds.items():
        both = {name: predictions[name] for name in (plain, augmented)}
        wanted = {
            name: table[table["corruption"].isin(["clean", *names])] for name, table in both.items()
        }
        for name, table in wanted.items():
            error = corruption_error.corruption_error(
                table, wanted[plain], patients, draws=run.bootstrap_draws
            )
            mean = error[error["corruption"].eq("mean")].replace(
                {"corruption": {"mean": f"mean of those {kind}"}}
            )
            made = report.result_rows(
                corruption_error.metric_rows(mean), study_of(name, study).run, model=name
            )
            report.update_results(made, RESULTS)
            cells += [
                {
                    "model": name,
                    "corruptions": kind,
                    "what": words[row["metric"]],
                    "cell": report.with_interval(row),
                }
                for _, row in mean[mean["metric"].isin(words)].iterrows()
            ]
pd.DataFrame(cells).pivot(index=["corruptions", "model"], columns="what", values="cell")

# %% [markdown]
# ## 4 How far do the maps move?
#
# Three maps: **saliency**, the size of the gradient at every pixel; **Grad-CAM** and **Grad-CAM++** at eight layers,
# from the first block to the last (the thesis looked at Grad-CAM++ in the second convolution of each block). Four rules,
# each against a slip of the original:
#
# 1. *One code path.* The clean image and its corrupted copies go through the same function. (There, the clean map was
#    computed on an image garbled by a conversion to 8 bits.)
# 2. *One class.* The class explained is the one predicted on the clean image, also where the corrupted copy is called
#    something else. (There, it was the class of the moment, so a change of the answer looked like drift.)
# 3. *Several scores.* RMSE of maps scaled to 0..255 (the thesis'), RMSE unscaled, structural similarity (SSIM), rank
#    correlation, overlap of the highest tenth, shift of the centre. Scaling each map by its own extremes hides that a map
#    has faded away; not scaling lets one bright pixel rule.
# 4. *A floor and a ceiling.* The same image explained again (floor), and another image explained for the same class
#    (ceiling). A drift of 40 grey levels means little if two different images differ by 45.
#
# First one image. Left, what the network was shown; then its Grad-CAM++ from the first layer to the last.

# %%
study = open_study(run)
name, severity = "resnet18", run.severities[len(run.severities) // 2]
image = some_images(study, "test", None)[:1]
own, model = study_of(name, study), load_models(study, [name])[name]
shown = {"clean": own.images(image)}
for kind in run.trained_on:
    shown[kind] = corrupt.apply(
        kind, shown["clean"], severity, seed=run.seed, ids=image, scale=run.scale
    )
test_opened(study, "maps of one image")
lines, target = [], None
for kind, x in shown.items():
    p = model(x).softmax(1)[0].detach().cpu().numpy()
    target = int(p.argmax()) if target is None else target  # of the clean image, which comes first
    cams = drift.read(model, x, target=target, methods=["gradcam++"])[2]
    pictures = [figures.Picture("" if lines else "image", x[0])]
    for (_, layer), heat in cams.items():
        unit = drift.prepared(heat)["unit"][0]  # by its own minimum and maximum
        pictures.append(figures.Picture("" if lines else layer, x[0], unit, alpha=0.5))
    label = f"{kind}\n{study.dataset.classes[p.argmax()]}\n{p.max():.3f}"
    lines.append((label.replace("_", " "), pictures))
figure = figures.figure_grid(lines, f"{name}, severity {severity}, {own.run.caption}")
report.save_figure(figure, run, "maps_of_one_image")
figure

# %% [markdown]
# Now all test images, every severity. It is also done for some *validation* images: they will choose, in section 6, which
# of the many scores is put to the test.

# %%
study = open_study(run)
test_opened(study, "drift of the maps")
images = {
    "test": some_images(study, "test", run.map_images),
    "val": some_images(study, "val", run.choose_images),
}
moved = {}
for name in MODELS:
    for part, rows in images.items():
        _, table = measured(name, study, f"maps_{part}", rows, names=run.mapped)
        moved[part, name] = table
        zero = table.groupby(["method", "layer"])["zero"].mean()
        most = " ".join(zero.idxmax())
        print(
            f"{name}, {part}: {len(rows)} images; a map of the pair is zero in at most "
            f"{zero.max():.1%} ({most})"
        )

# %%
for plain, augmented in PAIRS.items():
    pair = {name: moved["test", name] for name in (plain, augmented)}
    figure = figures.figure_drift(pair, study_of(plain, study).run.caption)
    report.save_figure(figure, run, f"drift_{plain}")
    display(figure)

# %% [markdown]
# Read the grey lines first. Where a line comes near the dashed one, the maps of the clean and the corrupted image are no more
# alike than those of two different patients: the map is then no longer about this image. The table says it in numbers, 0
# being the floor and 1 the ceiling, for the deepest layer and the highest severity. Above 1, two patients' maps have more
# in common (both show a chest) than an image and its corrupted copy. Where many maps are zero the scale is not to be
# trusted: two empty maps agree perfectly.

# %%
shares, key = [], ["method", "layer"]
for name in MODELS:
    means = moved["test", name].groupby(["corruption", "severity", *key], sort=False)["rmse"].mean()
    means = means.unstack("corruption")
    floor, ceiling = (means[which].xs(0) for which in (drift.FLOOR, drift.CEILING))
    place = means.xs(run.severities[-1]).sub(floor, axis=0).div(ceiling - floor, axis=0)
    deepest = [layer for method, layer in place.index if method == "gradcam++"][-1]
    for method, layer in (("gradcam++", deepest), ("saliency", "input")):
        own = place.loc[(method, layer), list(run.mapped)]
        shares.append(own.rename(f"{name} {method} {layer}"))
pd.concat(shares, axis=1).T.round(2)

# %% [markdown]
# ## 5 As in the thesis: the fall of the AUC against the movement of the maps
#
# One point for each corruption and severity. The thesis drew *every image* against the one $\Delta$AUC of its cell; images of
# a cell share that number, and a thousand points then look like evidence where there are a few dozen. The rank
# correlation in each title is over these cells. Even it is generous: severity drives both axes, so the points of one
# corruption (joined by a line) rise together whatever the maps show.

# %%
study = open_study(run)
seen, moved = ({name: maps_of(name, study)[part] for name in MODELS} for part in (0, 1))
images = seen[MODELS[0]]["image"].unique()
patients = pd.Series(study.patients(images), index=images)
grids = {
    name: corruption_error.grid(table, patients, draws=run.bootstrap_draws)
    for name, table in seen.items()
}
for plain, augmented in PAIRS.items():
    two = [{name: tables[name] for name in (plain, augmented)} for tables in (grids, moved)]
    figure = figures.figure_scatter(*two, study_of(plain, study).run.caption)
    report.save_figure(figure, run, f"scatter_{plain}")
    display(figure)

# %% [markdown]
# ## 6 The question: does drift warn?
#
# A cell's mean cannot warn anybody. What a user would need is a score of *this image's* map that is higher when *this
# image's* answer is wrong. So, image by image: the AUROC of drift for **error** (wrong answer), **flip** (another answer than
# on the clean image) and **new error** (wrong, though the clean image was read right). 0.5 is a coin.
#
# Three readings, from the loosest to the strictest:
#
# - *mixed*: any copies are compared, each image weighing the same, however many copies it has. Severity drives drift
#   and error alike, so severity itself is a predictor here, and drift has to beat it.
# - *within*: only copies under the same corruption at the same severity are compared.
# - *same answer*: and only of images that got the same answer when clean. A corruption often makes a network call
#   everything one class. Then all images of the other class are wrong, and their maps, drawn for a class the network has
#   given up, have moved: the score tells the classes apart and passes for a warning. Here it cannot.
#
# And two rivals that need no map at all: the network's own **uncertainty** on the corrupted image (1 minus its highest
# probability), which has the advantage that it needs no clean image either; and the **shift of the probabilities** between
# clean and corrupted.
#
# There are some hundred scores (methods, layers, measures). The best of a hundred looks good by luck. So the choice is
# made on validation images, per network, and the test images judge that one.

# %%
study = open_study(run)
test_opened(study, "drift as a warning")
tables, chosen = {}, {}
for name in MODELS:
    read = {part: maps_of(name, study, part) for part in ("val", "test")}
    chosen[name] = warning.select(*read["val"])
    images = read["test"][0]["image"].unique()
    patients = pd.Series(study.patients(images), index=images)
    tables[name] = warning.judge(
        *read["test"],
        patients,
        predictors=[chosen[name]],
        against=["uncertainty", "p_shift"],
        draws=run.bootstrap_draws,
    )
    made = report.result_rows(
        warning.metric_rows(tables[name]), study_of(name, study).run, model=name
    )
    report.update_results(made, RESULTS)
cells = pd.concat([table.assign(model=name) for name, table in tables.items()])
cells = cells[cells["outcome"].eq("error") & cells["metric"].eq("auroc")]
counts = cells["events"].astype(str) + " of " + cells["copies"].astype(str) + " copies wrong"
marked = cells.assign(model=cells["model"] + ": " + counts)
options = {"panel": "reading", "row": "predictor", "series": "model", "chance": 0.5}
figure = figures.figure_forest(marked, f"AUROC for wrong answers, {run.caption}", **options)
report.save_figure(figure, run, "warning")
figure

# %% [markdown]
# **In words.** The intervals decide: drift warns where the one of its AUROC lies above 0.5, and is better than the
# uncertainty where that of the difference, on the same images, lies above 0. Where fewer than ten patients have a wrong
# answer, or none but wrong ones, nothing is said.

# %%
WHERE = {
    "within": "At equal corruption and severity",
    "same answer": "At equal corruption, severity and clean answer",
    "mixed": "Over all corruptions and severities mixed",
}


def verdict(table, reading):
    """Two sentences on the drift score in `table`."""
    own = table[table["outcome"].eq("error") & table["reading"].eq(reading)]
    own = own[own["method"].ne("")]  # not the rivals
    auroc, gain = (own[own["metric"].eq(m)].iloc[0] for m in ("auroc", "auroc_over_uncertainty"))
    if min(auroc["event_patients"], auroc["other_patients"]) < 10:
        return f"{WHERE[reading]}, too few patients with wrong answers, or with right ones."
    says = "no warning of wrong answers by drift can be shown"
    if auroc["ci_low"] > 0.5:
        says = "drift warns of wrong answers: copies with them drift more"
    elif auroc["ci_high"] < 0.5:
        says = "drift does not warn of wrong answers: copies with them drift less"
    compared = "No difference to the model's own uncertainty can be shown"
    if gain["ci_low"] > 0:
        compared = "It ranks them better than the model's own uncertainty does"
    elif gain["ci_high"] < 0:
        compared = "The model's own uncertainty, which needs no map, ranks them better"
    value = f"AUROC {report.with_interval(auroc)}, {auroc['events']} of {auroc['copies']} copies"
    more = f"drift minus uncertainty {report.with_interval(gain, signed=True)}"
    return f"{WHERE[reading]}, {says} ({value}). {compared} ({more})."


# %%
lines = []
for name, table in tables.items():
    lines.append(f"**{name}** (chosen on validation: {' '.join(chosen[name])})\n")
    lines += [f"- {verdict(table, reading)}" for reading in warning.READINGS]
    lines.append("")
Markdown("\n".join(lines))

# %% [markdown]
# Beside its rivals, for wrong answers. Drift needs the clean image; so does `p_shift`, which costs two forward passes and no
# map. A drift that does not beat `p_shift` tells nothing that the two probabilities did not tell already.

# %%
cells = cells.assign(cell=[report.with_interval(row) for _, row in cells.iterrows()])
cells.pivot_table(
    index=["model", "predictor"], columns="reading", values="cell", aggfunc="first", sort=False
).fillna("")

# %% [markdown]
# The same split by hand, without any statistic: the drift of images whose answer was kept, and of images whose answer was
# turned, corruption by corruption. Two boxes that lie side by side at different heights are a warning; two that overlap
# are not.

# %%
name, key = "resnet18", ["image", "corruption", "severity"]
(method, layer, score), (seen, moved) = chosen[name], maps_of(name, study)
own = moved[moved["method"].eq(method) & moved["layer"].eq(layer)].merge(seen, on=key)
before = seen[seen["corruption"].eq("clean")].set_index("image")["predicted"]
turned = own["predicted"].ne(own["image"].map(before))
own["group"] = own["corruption"] + np.where(turned, " turned", " kept")
each = own.groupby(["group", "image"])[score].mean().reset_index()  # an image once a box
looks = {"whis": (5, 95), "showfliers": False, "grid": False, "rot": 40, "figsize": (9, 4)}
axis = each.boxplot(score, by="group", **looks)
axis.set(title="", xlabel="", ylabel=score)
axis.set_xticklabels(axis.get_xticklabels(), ha="right")
figure = axis.figure
figure.suptitle(f"{name}, {method}, {layer}, {run.caption}", fontsize=9)
figure.tight_layout()
report.save_figure(figure, run, "kept_flipped")
plt.close(figure)
figure


# %% [markdown]
# ## 7 Results and files
#
# The thesis' own files, as CSV: RMSE of Grad-CAM++ by corruption and layer for each severity and class (`*_rmses.csv`),
# image by image (`*_rmses_all.csv`), AUC by corruption and severity (`*_auc.csv`), and the tidy tables they were made
# from. A file name is the data set, class, severity and training, joined by `_`.

# %%
def slug(name):
    """A part of a file name: letters, digits and dots; "_" only separates parts."""
    return re.sub(r"[^\w.-]|_", "-", str(name)).strip("-.")


def rmse_tables(seen, moved, classes, start, suffix):
    """Mean RMSE, corruptions down and layers across, by severity and class; each image's."""
    own = moved[moved["method"].eq("gradcam++")]
    own = own[~own["corruption"].isin([drift.FLOOR, drift.CEILING])]
    label = seen.drop_duplicates("image").set_index("image")["label"]
    own = own.assign(label=own["image"].map(label), cell=own["corruption"] + "/" + own["layer"])
    parts, tables = {start: own}, {}
    for number, name in enumerate(classes):
        parts[f"{start}_{slug(name)}"] = part = own[own["label"].eq(number)]
        wide = part.pivot(index=["image", "severity"], columns="cell", values="rmse")
        tables[f"{start}_{slug(name)}{suffix}_rmses_all"] = wide[part["cell"].unique()]
    across = {"index": "corruption", "columns": "layer", "values": "rmse", "sort": False}
    for name, part in parts.items():
        for severity, cells in part.groupby("severity"):
            tables[f"{name}_sev{severity}{suffix}_rmses"] = cells.pivot_table(**across)
    return tables


# %%
def auc_table(seen, classes):
    """AUC of each class against the rest: clean, at each severity, and the drops (delta)."""
    rows = []
    for number in [1] if len(classes) == 2 else range(len(classes)):
        cells = seen.groupby(["corruption", "severity"], sort=False)
        auc = {
            key: roc_auc_score(cell["label"].eq(number), cell[f"p{number}"]) for key, cell in cells
        }
        auc = pd.Series(auc).rename_axis(["corruption", "severity"])
        clean, wide = auc["clean", 0], auc.drop("clean").unstack(sort=False)
        table = wide.add_prefix("sev").join((clean - wide).add_prefix("delta_sev"))
        table.insert(0, "clean", clean)
        rows.append(pd.concat({classes[number]: table}, names=["class"]))
    return pd.concat(rows)


# %%
study = open_study(run)
folder, flag, classes = run.run_dir / "thesis", slug(run.location.dataset), study.dataset.classes
for name in MODELS:
    network, suffix = name.removesuffix("_augmented"), "" if name in PAIRS else "_augmented"
    seen, moved = maps_of(name, study)
    tables = rmse_tables(seen, moved, classes, flag, suffix)
    tables[f"{flag}{suffix}_auc"] = auc_table(seen, classes)
    for title, table in tables.items():
        files.write_csv(table.reset_index(), folder / network / f"{title}.csv")
    for title, table in (("drift", moved), ("predictions", seen)):
        files.write_csv(table, folder / network / f"{flag}{suffix}_{title}.csv")
    print(f"{len(tables) + 2} files in thesis/{network}, {flag}{suffix}_auc.csv among them")
pd.read_csv(folder / "resnet18" / f"{flag}_sev{max(run.severities)}_rmses.csv").round(1)

# %%
results = pd.read_csv(made_by(run, "results.csv", "3 How far does accuracy fall?"))
clean = results[results["attack"].eq("clean") & results["metric"].eq("auc")]
display(clean[["model", "metric", "value", "ci_low", "ci_high", "n"]].round(3))
display(pd.read_csv(run.run_dir / "resources.csv"))
written = sorted(
    p.relative_to(run.run_dir).as_posix() for p in run.run_dir.rglob("*") if p.is_file()
)
print(f"{len(written)} files in {run.run_dir.parent.name}/{run.run_dir.name}:")
print("\n".join(name for name in written if not name.startswith(("tables/", "thesis/"))))
