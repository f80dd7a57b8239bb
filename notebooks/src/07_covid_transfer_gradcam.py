# %% [markdown]
# # 07 COVID-19: transfer learning, Grad-CAM from scratch, and a shortcut audit
#
# Take a network that has learnt a million everyday photographs, put a new last layer on it, and it tells COVID-19
# images from normal ones almost without an error. Does it read the lungs, or the hospital? The public collections took
# their COVID images from other places than their normal ones, and a network is content with whatever tells the two
# apart. This notebook builds the model, explains it with a Grad-CAM written from its formula, and then asks the
# question that a heat map alone cannot answer.
#
# **What you get**
#
# | part | question |
# |---|---|
# | 1 Data | What was split, and how? (the exploration is in [notebook 06](06_covid_baseline.ipynb)) |
# | 2 Frozen network, new head | Which head, which batch size, rate and dropout? |
# | 3 Fine-tuning | Does training the whole network help, and how small must the rate be? |
# | 4 The test, opened once | Baseline, frozen and fine-tuned network on the same images, paired |
# | 5 Grad-CAM from scratch | The formula, step by step; one logit and two; against captum |
# | 6 Right and wrong answers | Maps of true and false positives and negatives |
# | 7 Shortcut audit | What remains when the lungs are taken away? |
# | 8 Questions | The assignment's questions 13 to 24, answered from this run's numbers |
#
# What came out on the real images stands in [results/README.md](../results/README.md); the outputs stored in this file are from the
# smoke profile on *synthetic* images with a tiny network whose features come from other synthetic images, and only show
# what you will see.
#
# *For research and teaching. Not a medical device.*

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"  # "smoke" (a minute), "cpu" (a laptop, half an hour), "full" (GPU), or "auto"
DATA_DIR = ""  # empty: find it; else the folder that holds it, or your own: two class folders
RUN_NAME = ""  # empty: profile and kind of data
RESUME = True  # True: go on where a run stopped; False: anew; "force": under other settings
CHANGES = {}  # settings of your own, whatever the profile, such as {"backbone": "resnet18"}

# %% [markdown]
# **The settings.** FULL is the whole study; CPU and SMOKE are what is smaller on a laptop and in a first look. To change
# one, whatever the profile, write it into `CHANGES` above: `CHANGES = {"epochs": 5}`. A typo is told, a changed setting
# is starred below, and the run gets a folder of its own, which takes over whatever the change does not touch.
#
# **Your own images**: `DATA_DIR` may be any folder with a folder of images for each class (below `train`, `val` and
# `test` if you have a split). A CSV in it with the columns `file` and, as you have them, `label`, `patient`, `split`
# says more. Without patients every image counts as one: `patient_pattern` reads them from the file names.

# %% tags=["settings"]
# The data; unusable_share: at most so many files may fail to decode
FULL = {"dataset": "covid", "seed": 0, "size": 224, "fit": "squash", "per_class": None}
FULL |= {"unusable_share": 0.01}
FULL |= {"val_share": 0.15, "test_share": 0.15, "classes": None, "patient_pattern": ""}
# The network: "resnet50_v2", "mobilenet_v2" (with width, stages), or any name of torchvision or
# timm
FULL |= {"backbone": "resnet50_v2", "width": 1.0, "stages": 7, "pretrained": True}
# The heads on the frozen network, and their recipe; max_minutes is for one training, None is no
# limit
FULL |= {"heads": ("linear", "mlp"), "hidden": 128, "dropout": 0.3, "epochs": 30, "batch_size": 32}
FULL |= {"lr": 1e-3}
FULL |= {"patience": 6, "max_minutes": 90.0, "num_workers": 2, "trials": 24, "extend": 3}
# Fine-tuning: blocks that learn, counted from the end, or "all"; rates, the largest first
FULL |= {"unfrozen": "all", "tuning_lrs": (1e-3, 2e-4, 4e-5, 8e-6), "tuning_epochs": 15}
# The baseline from scratch; the shortcut audit, on at most so many training images
FULL |= {"baseline_channels": (32, 64, 128), "baseline_epochs": 30, "audit_images": 2000}
FULL |= {"bootstrap_draws": 2000}

# %% tags=["settings"]
CPU = {"size": 128, "backbone": "mobilenet_v2", "num_workers": 0, "trials": 12, "tuning_epochs": 10}
CPU |= {"baseline_channels": (16, 32, 64), "baseline_epochs": 8, "audit_images": 1000}

# per_class as in notebook 06: the same images, the same split
SMOKE = {"size": 48, "per_class": 90, "backbone": "mobilenet_v2", "width": 0.5, "stages": 3}
SMOKE |= {"pretrained": "phantom", "hidden": 32, "epochs": 20, "batch_size": 16, "lr": 3e-3}
SMOKE |= {"patience": 6}
SMOKE |= {"max_minutes": None, "num_workers": 0, "trials": 4, "extend": 1}
SMOKE |= {"tuning_lrs": (3e-3, 1e-3)}
SMOKE |= {"tuning_epochs": 24, "baseline_channels": (8, 16), "baseline_epochs": 10}
SMOKE |= {"audit_images": 120}
SMOKE |= {"bootstrap_draws": 200}

# %% tags=["start"]
from dlia_utils.run import start

run = start(
    "07_covid_transfer_gradcam",
    dict(full=FULL, cpu=CPU, smoke=SMOKE),
    dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES),
    allowed={"pretrained": ("phantom",)},
    own_data=2,
    trains="3 Fine-tuning the whole network",
)
print(run)

# %% tags=["imports"]
import copy  # noqa: I001 (one line a module keeps this cell readable)
import json
import tempfile
import time

import numpy as np
import pandas as pd
import torch
from captum.attr import LayerGradCam
from IPython.display import Markdown, display
from scipy.stats import spearmanr
from torch.nn.functional import interpolate
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from dlia_utils.data import augment, datasets
from dlia_utils import device
from dlia_utils import plots
from dlia_utils import files, metrics, models, objectives, report
from dlia_utils import search, shortcuts, train
from dlia_utils.data import split
from dlia_utils.explain import figures
from dlia_utils.explain.gradcam import gradcam
from dlia_utils.study import (
    build_model,
    fit_model,
    load_models,
    made_by,
    open_study,
    predictions,
    stored,
    test_opened,
    trained,
)
from dlia_utils.study import train_model, weights_key, weights_label, work_folder

RESULTS = run.run_dir / "results.csv"


# %% [markdown]
# **Your model here.** One line adds the Grad-CAM of any convolutional network to section 5: a function that *builds* one
# (it is trained here), or a network that is *trained already*. `models.wrap` puts its normalisation inside, and the layer
# is found by itself. To fine-tune another network throughout, change the setting: `CHANGES = {"backbone": "resnet18"}`.

# %% tags=["yours"]
# run.own["densenet121"] = lambda: models.backbone("densenet121", num_classes=2)
# run.own["mine"] = models.wrap(my_trained_network, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224,
# 0.225])
def loss_of(study):
    """Cross-entropy in which both classes weigh the same."""
    return objectives.cross_entropy(weight=study.class_weights())


def baseline_folder(study):
    """Where the baseline lies: in a finished run of notebook 06 with this run's name and split,
    else in this run."""
    if (run.run_dir / "baseline" / "best.pt").exists():  # one run keeps to one baseline
        return run.run_dir
    other = run.run_dir.parents[1] / "06_covid_baseline" / run.run_dir.name
    if not ((other / "predictions.csv").exists() and (other / "split.json").exists()):
        return run.run_dir
    same = (
        json.loads((other / "split.json").read_text(encoding="utf-8"))["hash"] == study.key["split"]
    )
    return other if same else run.run_dir


# %% [markdown]
# ## 1 The data
#
# *COVID* and *Normal* of the COVID-19 Radiography Database, or the `covid_xray` folders of a course. Where no split
# into training, validation and test images is published, one is drawn: stratified, and with byte-identical images and
# near-duplicates (perceptual hash, confirmed by correlation) always on one side. Notebook 06 draws the same split, so
# that the models of both notebooks can be compared image by image. Patients and sources are not named in these copies:
# two images of one patient that do not look alike may still lie on both sides, which no code can repair.

# %%
study = open_study(run)
print(study.dataset.split_rule)
display(datasets.summary(study.dataset))
pd.set_option("display.max_colwidth", 100)
split.audit(study.dataset)

# %%
labels = study.labels(study.rows("train")).cpu().numpy()
shown = np.concatenate([study.rows("train")[labels == c][:6] for c in (0, 1)])
titles = study.dataset.manifest.loc[shown, "class_name"].tolist()
figure = plots.figure_samples(study.images(shown).cpu().numpy(), titles, run.caption)
report.save_figure(figure, run, "samples")
figure


# %% [markdown]
# ## 2 Frozen network, new head
#
# **The network.** The assignment asks for ResNet-50 V2, the *pre-activation* form of He et al.
# ([1603.05027](https://arxiv.org/abs/1603.05027)). Mind the names: torchvision's `IMAGENET1K_V2` weights belong to the
# ordinary ResNet-50 and are only a newer training recipe. Here the network is the suite's own, and its ImageNet weights
# come through timm or from a file. Where they cannot be had, and in the laptop profile, MobileNetV2 takes its place;
# the first line below says which one it is.
#
# **Frozen means two things.** No weight is trained (`requires_grad=False`), *and* batch normalisation stays in
# evaluation mode. In Keras the first brings the second; in PyTorch it does not: a frozen network left in training mode
# takes over the statistics of the new images batch by batch, and drifts although no weight moves. The suite's
# `with_head` keeps the frozen part in evaluation mode whatever `train()` is called.

# %%
def pretrained(study):
    """The network whose features are used; only for the study's ResNet-50 V2 there is a stand-in
    without its weights."""
    if run.backbone == "mobilenet_v2":
        return build_model(run)
    classes = study.dataset.classes
    try:
        options = dict(num_classes=len(classes), pretrained=run.pretrained is True, seed=run.seed)
        network = models.backbone(run.backbone, **options)
    except RuntimeError as error:
        if run.backbone != "resnet50_v2" or "backbone" in run.changed:
            raise  # a network that was asked for by name is never replaced by another
        print(f"MobileNetV2 takes the place of ResNet-50 V2: {error}")
        return build_model(run)
    models.check_classifier(network, study.images(study.rows("train")[:2]).cpu(), classes=classes)
    label = f"{run.backbone} imagenet" if run.pretrained is True else "random"
    files.write_text(label, run.run_dir / "weights.txt")  # what the result rows will say
    return network.to(run.device)


def with_statistics(network, study):
    """A random network with the training images' statistics in its batch norms: without any, the
    features would fade."""
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the plain mean over all batches
    network.train()
    with torch.no_grad():
        for rows in np.array_split(
            study.rows("train"), -(-len(study.rows("train")) // run.batch_size)
        ):
            network(study.images(rows))
    return network.eval()


# %%
study = open_study(run)
work_folder(
    run,
    "start",
    study.key | run.pick("backbone", "pretrained", "width", "stages", "seed", "batch_size"),
)
if not trained(
    study, ["start"]
):  # kept, so that every later section has the same network, with or without internet
    body = pretrained(study)
    body = with_statistics(body, study) if weights_label(run) == "random" else body
    models.save(
        models.with_head(body, seed=run.seed), run.run_dir / "start" / "best.pt", meta={"epoch": 0}
    )
start = load_models(study, ["start"])["start"]
network = start.recipe["body"].get("arch", start.recipe["body"]["name"])
missed = "" if network == run.backbone else f" (the weights of {run.backbone} could not be had)"
print(f"network: {network}{missed}; weights: {weights_label(run)}")
norms = [
    layer
    for layer in start.train().backbone.body.modules()
    if isinstance(layer, torch.nn.BatchNorm2d)
]
print(
    f"after train(): {sum(layer.training for layer in norms)} of {len(norms)} batch norms of the "
    "body in training mode"
)
models.summary(start.eval(), run.size).tail(6)


# %% [markdown]
# **The features are computed once.** A frozen network gives the same features for the same image, so they are kept, and
# a head learns from them in seconds. The price: no augmentation here; fine-tuning (section 3) has it.
#
# **Two heads**, both with dropout before the last layer: `linear` (one layer) and `mlp` (a hidden layer with ReLU and
# batch norm between). Both get one initial training with the same settings; the smaller *validation loss* decides. The
# loss, because with a few hundred validation images accuracy moves in steps and AUC is soon near 1, while the loss still
# tells good from better.

# %%
def features(study, *splits):
    """The frozen network's features of the splits, computed once in a run, as one set (feature,
    label, row)."""
    return ConcatDataset([features_of(study, name) for name in splits])


def features_of(study, name):
    path = (
        work_folder(run, "features", study.key | {"start": weights_key(run, "start")})
        / f"{name}.pt"
    )
    if not path.exists():
        begun, start = time.monotonic(), load_models(study, ["start"])["start"]
        found = models.cached_features(start, study.torch_set(name))
        with files.atomic_path(path) as temporary:
            torch.save({"columns": found.tensors, "seconds": time.monotonic() - begun}, temporary)
    return TensorDataset(*torch.load(path, weights_only=True)["columns"])


def new_model(start, head, dropout):
    """The frozen network under a head of its own, drawn anew."""
    return models.with_head(start, head=head, hidden=run.hidden, dropout=dropout, seed=run.seed)


def fit_head(study, name, model, train_set, val_set, **options):
    """Train the head on features, and keep the whole model."""
    fitted = fit_model(
        study,
        f"{name}_head",
        model.head,
        loss_of(study),
        train_set,
        val_set,
        num_workers=0,
        depends={"start": weights_key(run, "start")},
        **options,
    )
    models.save(model, run.run_dir / name / "best.pt", meta={"epoch": fitted.best_epoch})
    return fitted


# %%
rows = []
for head in run.heads:
    model = new_model(start, head, run.dropout)
    sets = features(study, "train"), features(study, "val")
    fitted = fit_head(study, f"initial_{head}", model, *sets, monitor="val_loss", patience=None)
    best = fitted.history.loc[fitted.history["val_loss"].idxmin()]
    weights = sum(parameter.numel() for parameter in model.head.parameters())
    rows.append(
        {
            "head": head,
            "weights": weights,
            "best epoch": fitted.best_epoch,
            "val_loss": best["val_loss"],
            "val_accuracy": best["val_accuracy"],
            "val_auc": best["val_auc"],
            "seconds": fitted.seconds,
        }
    )
heads = pd.DataFrame(rows)
files.write_csv(heads, run.run_dir / "heads.csv")
head = heads.loc[heads["val_loss"].idxmin(), "head"]
print("head that goes on:", head)
heads.round(3)

# %%
histories = {
    name: pd.read_csv(run.run_dir / f"initial_{name}_head" / "metrics.csv") for name in run.heads
}
figure = plots.figure_curves(histories, run.caption)
report.save_figure(figure, run, "initial")
figure

# %% [markdown]
# **The search** over batch size, learning rate and dropout. Every run makes a *new* head; a run that is worse than the
# median of the earlier ones at the same epoch is cut off; early stopping ends the others. The rule of the assignment is
# kept by code: if the best value lies on the edge of its range, the range grows on that side and the search goes on. All
# runs are in `search/runs.csv`, and a search that was cut off goes on from there.

# %%
space = {
    "batch_size": search.Choice((16, 32, 64), beyond=((4, 8), (128, 256))),
    "lr": search.Range(1e-4, 1e-2, log=True, hard=(1e-6, 0.1)),
    "dropout": search.Range(0.1, 0.6, hard=(0.0, 0.9)),
}


def one_run(params, tell):
    """Train a new head with these settings; what chooses is the smallest validation loss."""
    model = new_model(start, head, params["dropout"])
    with (
        tempfile.TemporaryDirectory() as scratch
    ):  # seconds of work: nothing to keep but its numbers
        fitted = train.fit(
            model.head,
            loss_of(study),
            features(study, "train"),
            features(study, "val"),
            run_dir=scratch,
            epochs=run.epochs,
            patience=run.patience,
            monitor="val_loss",
            lr=params["lr"],
            seed=run.seed,
            batch_size=params["batch_size"],
            on_epoch=lambda row: tell(row["epoch"], row["val_loss"]),
            progress=False,
        )
    best = fitted.history.loc[fitted.history["epoch"].eq(fitted.best_epoch)].iloc[0]
    return {
        "score": fitted.best_score,
        "val_accuracy": best["val_accuracy"],
        "val_auc": best["val_auc"],
        "best_epoch": fitted.best_epoch,
    }


given = run.pick("trials", "extend", "epochs", "patience", "hidden", "seed")
given |= study.key | {"head": head, "start": weights_key(run, "start")}
found = search.search(
    one_run,
    space,
    folder=work_folder(run, "search", given),
    trials=run.trials,
    seed=run.seed,
    direction="minimize",
    extend=run.extend,
    resume=bool(run.resume),
    config=given,
)
display(search.top_runs(found.runs, count=6, direction="minimize").round(4))
found.ranges

# %%
figure = plots.figure_search(found.runs, run.caption, direction="minimize")
report.save_figure(figure, run, "search")
figure

# %% [markdown]
# **The final frozen model** learns from training *and* validation images, for the number of epochs that early stopping
# found, without early stopping: there is nothing left to stop by. `selected`, trained on the training images alone, is
# kept too: fine-tuning needs a start whose validation numbers are honest.

# %%
best = {name: found.best[name] for name in ("lr", "batch_size")}
selected = new_model(start, head, found.best["dropout"])
sets = features(study, "train"), features(study, "val")
fitted = fit_head(
    study, "selected", selected, *sets, monitor="val_loss", patience=run.patience, **best
)
epochs = search.retrain_epochs(fitted.history, monitor="val_loss")
frozen = new_model(start, head, found.best["dropout"])
final = fit_head(
    study,
    "frozen",
    frozen,
    features(study, "train", "val"),
    None,
    monitor="epoch",
    epochs=epochs,
    patience=None,
    **best,
)
again = load_models(study, ["frozen"])["frozen"]
same = device.fingerprint(frozen) == device.fingerprint(again)
before, after = (
    train.predict(model, study.torch_set("val"))[0] for model in (frozen.to(run.device), again)
)
print(
    f"{epochs} epochs; saved and read back: weights bit-equal {same}, answers bit-equal "
    f"{np.array_equal(before, after)}"
)
figure = plots.figure_curves(
    {"final, train + val": final.history, "selected, held-out": fitted.history}, run.caption
)
report.save_figure(figure, run, "frozen")
figure


# %% [markdown]
# ## 3 Fine-tuning the whole network
#
# Now all layers learn, batch norms included, from augmented images, starting from the trained head. Too large a rate
# destroys in a few steps what a million photographs taught. The rule of the assignment, as code: if the accuracy on the
# **training** images falls by more than 0.02 (and by more than twice the standard error of a difference, so that a few
# images do not decide), the weights are loaded again and the next smaller rate is tried; if no attempt has a better
# validation loss than the frozen model, the frozen model stays. Test images have no part in it.
#
# Within an attempt the rate falls to zero along a cosine. At a constant rate the validation loss jumps from epoch to
# epoch, and the final training below has no validation images to choose a good epoch by; with a rate that ends at zero
# the last epoch is the one to keep.
#
# The fall is measured from the frozen model's accuracy under the *same* conditions, augmented images and active dropout:
# compared with its accuracy on plain images, every fine-tuning would seem to fall.

# %%
def train_accuracy(study, model):
    """Share of augmented training images that a model gets right with active dropout, as in a
    training."""
    model, right = copy.deepcopy(model).train(), 0
    images, order = (
        study.torch_set("train", augmented=True),
        torch.Generator().manual_seed(run.seed),
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(run.seed)
        # Shuffled: the images are sorted by class, and the head's batch norm takes away what a
        # batch has in common.
        for x, y, _ in DataLoader(images, batch_size=run.batch_size, shuffle=True, generator=order):
            right += (model(x.to(run.device)).argmax(1).cpu() == y).sum().item()
    return pd.DataFrame({"train_accuracy": [right / len(images)]})


def unfrozen(study, name):
    """A trained model, with the body's blocks free to learn."""
    return models.unfreeze(load_models(study, [name])[name], run.unfrozen)


study = open_study(run)
history = pd.read_csv(made_by(run, "selected_head/metrics.csv", "2 Frozen network, new head"))
measured = stored(
    study,
    "train_accuracy_selected",
    lambda: train_accuracy(study, *load_models(study, ["selected"]).values()),
    model="selected",
    uses=["batch_size", "seed"],
)
share = measured["train_accuracy"].item()
frozen_scores = {"train_accuracy": share, "val_loss": history["val_loss"].min()}
tolerance = max(0.02, 2 * np.sqrt(2 * share * (1 - share) / len(study.rows("train"))))
given = run.pick("tuning_lrs", "tuning_epochs", "unfrozen", "batch_size", "seed")
given |= study.key | {"selected": weights_key(run, "selected")}
tuned = search.finetune_with_drop_rule(
    lambda: unfrozen(study, "selected"),
    loss_of(study),
    study.torch_set("train", augmented=True),
    study.torch_set("val"),
    run_dir=work_folder(run, "tuning", given),
    lrs=run.tuning_lrs,
    epochs=run.tuning_epochs,
    baseline=frozen_scores,
    tolerance=tolerance,
    monitor="val_loss",
    patience=None,
    schedule="cosine",
    batch_size=run.batch_size,
    num_workers=run.num_workers,
    seed=run.seed,
    resume=bool(run.resume),
    max_minutes=run.max_minutes,
    config=given,
)
print(
    f"frozen model, augmented training images: accuracy {share:.3f}; a fall of more than "
    f"{tolerance:.3f} ends an attempt"
)
tuned.attempts.round(4)

# %% [markdown]
# If there was a gain, the final frozen model is fine-tuned in the same way, on training and validation images together.
# If there was none, there is no fine-tuned model, and everything below goes on without it.

# %%
if tuned.fitted is None:
    print("no gain on the validation images: the frozen model is kept")
else:
    rate = tuned.attempts["lr"].iloc[-1]
    rows = np.concatenate([study.rows("train"), study.rows("val")])
    images = augment.CachedImages(
        study.cache,
        rows,
        study.labels(rows).cpu().numpy(),
        transform=augment.train_transform(),
        seed=run.seed,
    )
    fitted = fit_model(
        study,
        "finetuned",
        unfrozen(study, "frozen"),
        loss_of(study),
        images,
        None,
        monitor="epoch",
        epochs=run.tuning_epochs,
        schedule="cosine",
        lr=rate,
        patience=None,
    )
    path = fitted.history["train_accuracy"]
    print(
        f"rate {rate:g}, {len(path)} epochs; training accuracy {path.iloc[0]:.3f} -> "
        f"{path.iloc[-1]:.3f}"
    )

# %%
folder = run.run_dir / "tuning"
attempts = {
    f"rate {row.lr:g}: {row.outcome}": pd.read_csv(folder / f"attempt{row.attempt}" / "metrics.csv")
    for row in tuned.attempts.itertuples()
    if row.epochs
}
figure = plots.figure_curves(attempts, run.caption)
report.save_figure(figure, run, "tuning")
figure


# %% [markdown]
# ## 4 The test, opened once
#
# **The baseline** is notebook 06's: a small network trained from nothing. If a finished run of that notebook with the
# same name *and the same split* lies beside this one, it is compared with; otherwise a small CNN is trained here in the
# same way (early stopping on validation images, then again on training and validation images for as many epochs).

# %%
def new_baseline():
    return models.cnn(channels=run.baseline_channels, seed=run.seed).to(run.device)


study = open_study(run)
if baseline_folder(study) == run.run_dir:
    print("no finished run of notebook 06 with this name and split: a baseline is trained here")
    sets, options = (study.torch_set("train", augmented=True), study.torch_set("val")), {"lr": 1e-3}
    held = fit_model(
        study,
        "baseline_val",
        new_baseline(),
        loss_of(study),
        *sets,
        epochs=run.baseline_epochs,
        monitor="val_loss",
        **options,
    )
    rows = np.concatenate([study.rows("train"), study.rows("val")])
    images = augment.CachedImages(
        study.cache,
        rows,
        study.labels(rows).cpu().numpy(),
        transform=augment.train_transform(),
        seed=run.seed,
    )
    epochs = search.retrain_epochs(held.history, monitor="val_loss")
    fit_model(
        study,
        "baseline",
        new_baseline(),
        loss_of(study),
        images,
        None,
        epochs=epochs,
        monitor="epoch",
        patience=None,
        **options,
    )
else:
    print("the baseline is that of notebook 06")
folders = {
    "baseline": baseline_folder(study) / "baseline",
    "frozen": made_by(run, "frozen_head/metrics.csv", "2 Frozen network, new head").parent,
}
folders |= {name: run.run_dir / name for name in trained(study, ["finetuned"])}
histories = {name: pd.read_csv(folder / "metrics.csv") for name, folder in folders.items()}
figure = plots.figure_curves(histories, run.caption)
report.save_figure(figure, run, "final_curves")
figure

# %% [markdown]
# **The test split is opened here, once for each model**, after every choice has been made. The answers are stored and
# read back when this cell runs again; a second opening, say after another training, is refused.

# %%
names = ["frozen", *trained(study, ["finetuned"])]
told = {name: predictions(study, name) for name in names}
answers = told["frozen"][["image", "path", "label"]]
if baseline_folder(study) == run.run_dir:
    answers["baseline"] = predictions(study, "baseline")["probability"]
else:  # opened and logged by that run
    given = pd.read_csv(baseline_folder(study) / "predictions.csv").set_index("path")
    answers["baseline"] = given.loc[answers["path"], "baseline"].to_numpy()
answers = answers.assign(**{name: table["probability"] for name, table in told.items()})
files.write_csv(answers, run.run_dir / "predictions.csv")
names = ["baseline", *names]
labels, patients = answers["label"].to_numpy(), study.patients(answers["image"].to_numpy())
clean = []
for name in names:
    outcome = metrics.classification(labels, answers[name], patients, draws=run.bootstrap_draws)
    rows = outcome.assign(
        epochs=len(histories[name]), weights="random" if name == "baseline" else weights_label(run)
    )
    clean.append(report.result_rows(rows, run, model=name))
clean = pd.concat(clean)
report.update_results(clean, RESULTS)
clean["cell"] = [report.with_interval(row) for _, row in clean.iterrows()]
clean.pivot_table(index="metric", columns="model", values="cell", aggfunc="first", sort=False)

# %% [markdown]
# **Paired**, because all models answered the same images. McNemar's exact test, by patient, asks whether one is right more
# often where they differ (`only_it` against `only_other` images, and its p); the interval of the AUC difference is DeLong's,
# by patient.

# %%
rows = []
for one, other in (("frozen", "baseline"), ("finetuned", "baseline"), ("finetuned", "frozen")):
    if one in answers:
        right = [(answers[name] > 0.5).to_numpy() == (labels == 1) for name in (one, other)]
        test = metrics.paired_difference(*right, patients, draws=run.bootstrap_draws)
        auc = metrics.delong_test(labels, answers[one], answers[other], patients)
        rows.append(
            {
                "model": one,
                "against": other,
                "only_it": test["only_a"],
                "only_other": test["only_b"],
                "p": test["p"],
                "auc_difference": auc["value"],
                "ci_low": auc["ci_low"],
                "ci_high": auc["ci_high"],
            }
        )
paired = pd.DataFrame(rows)
files.write_csv(paired, run.run_dir / "paired_tests.csv")
paired.round(4)

# %%
predicted = {name: (answers[name] > 0.5).astype(int) for name in names}
figure = plots.figure_confusion(labels, predicted, study.dataset.classes, run.caption)
report.save_figure(figure, run, "confusion")
display(figure)
figure = plots.figure_roc(labels, {name: answers[name] for name in names}, run.caption)
report.save_figure(figure, run, "roc")
figure

# %% [markdown]
# A few test images, as decoded (the model normalises for itself), with the last model's p(COVID).

# %%
shown = answers.groupby("label").head(6).sort_values("label")
titles = [
    f"{study.dataset.classes[row.label]}, p = {getattr(row, names[-1]):.2f}"
    for row in shown.itertuples()
]
figure = plots.figure_samples(
    study.images(shown["image"].to_numpy()).cpu().numpy(), titles, run.caption
)
report.save_figure(figure, run, "answers")
figure

# %% [markdown]
# ## 5 Grad-CAM from scratch
#
# Where in the image does the network find what speaks for its answer? Let $A \in \mathbb{R}^{C \times h \times w}$ be the
# last feature map, before it is averaged over places, and $z_c$ the logit of class $c$. Grad-CAM (Selvaraju et al.,
# [1610.02391](https://arxiv.org/abs/1610.02391)) weighs each channel by how much the logit grows with it, and adds:
#
# $$w_k = \frac{1}{hw}\sum_{i,j}\frac{\partial z_c}{\partial A_{kij}}, \qquad
# L_{ij} = \mathrm{ReLU}\Big(\sum_k w_k A_{kij}\Big).$$
#
# The ReLU keeps what speaks *for* the class. The map is divided by its maximum, enlarged to the size of the image and laid
# over it with weight 0.4. Three traps:
#
# - the *logit* is explained, not the probability, whose gradient vanishes where the model is sure. These models
#   return logits; a network that ends in a softmax or sigmoid must lose it first;
# - in a **frozen** network nothing asks for a gradient, and autograd has no graph. The map $A$ itself is cut out and asks
#   for one; no weight is touched;
# - if no place speaks for the class, the ReLU leaves zeros, and dividing by the maximum makes NaN, which a plotting
#   library paints as a valid map. Zero maps are called so here.
#
# One test image, every step by hand (the models are the final ones; which image is shown decides nothing):

# %%
study = open_study(run)
name = "finetuned" if trained(study, ["finetuned"]) else "frozen"
model = load_models(study, [name])[name].requires_grad_(False)
test_opened(study, "Grad-CAM step by step on one image")
row = study.rows("test")[study.labels(study.rows("test")).cpu().numpy() == 1][:1]
x, layer, kept = study.images(row), models.last_map_layer(model), []


def cut(module, inputs, output):
    kept.append(output.detach().requires_grad_())  # the graph begins here
    return kept[-1].clone()  # what follows may work in place


handle = model.get_submodule(layer).register_forward_hook(cut)
logits = model(x)  # 1 evaluate
handle.remove()
target = logits.argmax(1).item()  # 2 the class to explain: the predicted one
(gradient,) = torch.autograd.grad(
    logits[0, target], kept[0]
)  # 3 its logit's gradient with respect to the map
weights = gradient.mean((2, 3))  # 4 mean over places: how much each channel counts
grid = torch.einsum("bk,bkij->bij", weights, kept[0].detach()).clamp(min=0)  # 5 weighted sum, ReLU
large = interpolate(grid[:, None], x.shape[2:], mode="bilinear", align_corners=False)[
    :, 0
]  # 6 to the image's size
heat = large / large.max().clamp(min=1e-30)  # 7 between 0 and 1
print(
    f"{name}: map {list(kept[0].shape)} of {layer}, grid {list(grid.shape)}, image {list(x.shape)}"
)
caption = f"{study.dataset.classes[1]}, read as {study.dataset.classes[target]}"
figure = figures.figure_overlays(x, {"by hand": heat}, captions=[caption], caption=run.caption)
report.save_figure(figure, run, "gradcam_by_hand")
figure


# %% [markdown]
# **One logit instead of two.** A network for two classes often ends in a single logit $z$: above 0 is COVID. Class COVID
# is then explained by $z$, and class *Normal* by $-z$, because what lowers $z$ is what speaks for *Normal*. Forgetting
# the sign explains the wrong class on every negative image. A softmax over two logits depends on $z_1 - z_0$ alone, so the
# same network can be read as a scalar model with $z = z_1 - z_0$. Its maps must be those of the two logits $(-z, z)$.
#
# The table holds the largest differences, relative to the map's maximum, on some test images: by hand against the suite's
# function, one logit against two, and both against [captum](https://captum.ai)'s `LayerGradCam`.

# %%
class OneLogit(torch.nn.Module):
    """A two-class model with the scalar logit z = z1 - z0; `signs` (-1, 1) gives the two logits
    (-z, z) instead."""

    def __init__(self, model, signs=(1.0,)):
        super().__init__()
        self.model, self.signs = model, signs

    def forward(self, x):
        logits = self.model(x)
        return (logits[:, 1:] - logits[:, :1]) * torch.tensor([self.signs], device=x.device)


def captums(net, x, module, target=None):
    """captum's grid; a frozen network needs an input that asks for a gradient."""
    method = LayerGradCam(net, module)
    return method.attribute(x.clone().requires_grad_(), target=target, relu_attributions=True)[
        :, 0
    ].detach()


def apart(one, other):
    """Largest difference relative to the largest value of either."""
    return (
        (one - other).abs().max() / torch.maximum(one.max(), other.max()).clamp(min=1e-30)
    ).item()


# %%
images = study.images(study.rows("test")[:: max(1, len(study.rows("test")) // 16)][:16])
module, before = model.get_submodule(layer), device.fingerprint(model)
scalar, double, negative = OneLogit(model), OneLogit(model, (-1.0, 1.0)), OneLogit(model, (-1.0,))
own = {c: gradcam(model, images, layer, target=c) for c in (0, 1)}
one = {c: gradcam(scalar, images, module, target=c) for c in (0, 1)}
two = {c: gradcam(double, images, module, target=c) for c in (0, 1)}
rows = [
    ("by hand", "the suite's function", apart(grid, gradcam(model, x, layer, target=target).grid))
]
for c, label in enumerate(study.dataset.classes):
    rows.append(
        (f"two logits, {label}", "captum", apart(own[c].grid, captums(model, images, module, c)))
    )
    net = scalar if c else negative
    rows.append((f"one logit, {label}", "captum", apart(one[c].grid, captums(net, images, module))))
    rows.append((f"one logit, {label}", "two logits (-z, z)", apart(one[c].grid, two[c].grid)))
checks = pd.DataFrame(rows, columns=["map", "against", "difference"]).assign(
    ok=lambda t: t["difference"] < 1e-5
)
files.write_csv(checks, run.run_dir / "gradcam_checks.csv")
print(
    f"the frozen model afterwards: bit-equal {device.fingerprint(model) == before}; weights that "
    "ask for a "
    f"gradient: {sum(p.requires_grad for p in model.parameters())}"
)
checks

# %% [markdown]
# **What two labels do to an explanation.** The two maps of the scalar logit come from the same weighted sum with
# opposite signs: where one is above zero the other is zero, and a place can only speak for COVID by speaking against
# *Normal*. Explaining the raw logit $z_1$ of a two-logit model is another question, though the probabilities are the
# same: the rank correlation below says how far the two answers agree.

# %%
both = ((one[0].grid > 0) & (one[1].grid > 0)).float().mean().item()
pairs = zip(own[1].grid.flatten(1).cpu().numpy(), one[1].grid.flatten(1).cpu().numpy(), strict=True)
likeness = [
    spearmanr(*pair).statistic for pair in pairs if np.ptp(pair[0]) > 0 and np.ptp(pair[1]) > 0
]
sides = pd.DataFrame(
    {
        "images": [len(images)],
        "places above zero in both maps": [both],
        "compared": [len(likeness)],
        "rank correlation of z1 and z1 - z0": [np.mean(likeness) if likeness else np.nan],
    }
)
files.write_csv(sides, run.run_dir / "gradcam_sides.csv")
display(sides.round(3))
panels = {
    f"two logits, {study.dataset.classes[1]}": own[1],
    f"one logit, {study.dataset.classes[1]}": one[1],
    f"one logit, {study.dataset.classes[0]} (-z)": one[0],
}
figure = figures.figure_overlays(
    images[:2],
    {key: found.heat()[:2] for key, found in panels.items()},
    captions=["test image 1", "test image 2"],
    caption=run.caption,
)
report.save_figure(figure, run, "one_logit")
figure

# %% [markdown]
# **The same for any network.** `gradcam(model, x)` finds the last layer that still has a map by itself. Beside the network
# of this notebook stand those that you put into `run.own`.

# %%
study = open_study(run)
for own in run.own:
    train_model(study, own, loss_of(study), monitor="val_loss")
compared = load_models(
    study, ["finetuned" if trained(study, ["finetuned"]) else "frozen", *run.own]
)
test_opened(study, "Grad-CAM of several networks")
labels = study.labels(study.rows("test")).cpu().numpy()
rows = np.concatenate([study.rows("test")[labels == c][:2] for c in (0, 1)])
x = study.images(rows)
maps = {name: gradcam(model, x).heat().cpu().numpy() for name, model in compared.items()}
captions = study.dataset.manifest.loc[rows, "class_name"].tolist()
figure = figures.figure_overlays(x.cpu().numpy(), maps, captions=captions, caption=run.caption)
report.save_figure(figure, run, "gradcam_networks")
figure

# %% [markdown]
# ## 6 Right and wrong answers
#
# Every test image falls into one of four groups: COVID found (true positive) or missed (false negative), normal left
# alone (true negative) or raised as an alarm (false positive). The map explains the class that the model *read*; of the
# right answers the clearest are shown, of the wrong ones the worst.
#
# The table adds what pictures cannot say: how much of the map lies inside the lungs, beside the share of the image that
# the lungs cover (a map that knows nothing would have just that), and how many maps are zero.

# %%
study = open_study(run)
name = "finetuned" if trained(study, ["finetuned"]) else "frozen"
model = load_models(study, [name])[name]
test_opened(study, "Grad-CAM of all test images")
rows = study.rows("test")
x, labels, patients = study.images(rows), study.labels(rows).cpu().numpy(), study.patients(rows)
probability = train.predict(model, x)[0][:, 1]
maps = torch.cat(
    [gradcam(model, part, models.last_map_layer(model)).heat().cpu() for part in x.split(64)]
)
masks, lungs = shortcuts.lung_masks(study.dataset, rows, study.cache)
read = (probability > 0.5).astype(int)
groups = {"all": np.ones(len(rows), bool), "right": read == labels, "wrong": read != labels}
for label, positive in ((1, 1), (0, 0), (0, 1), (1, 0)):
    kind = f"{'true' if label == positive else 'false'} {'positive' if positive else 'negative'}"
    groups[kind] = (labels == label) & (read == positive)
draws, tables = run.bootstrap_draws, []
for group, members in groups.items():
    if members.any():
        inside = shortcuts.inside_energy(
            maps[members], masks[members], groups=patients[members], draws=draws
        )
        tables.append(inside.assign(group=group))
energy = pd.concat(tables)
files.write_csv(energy, run.run_dir / "energy.csv")
outcome = energy[energy["metric"].ne("area") & energy["group"].eq("all")].assign(
    attack="Grad-CAM inside the lungs"
)
report.update_results(
    report.result_rows(outcome.filter(report.RESULT_COLUMNS), run, model=name), RESULTS
)
energy["cell"] = [report.with_interval(row) for _, row in energy.iterrows()]
print("lungs are", lungs)
energy.pivot_table(
    index=["group", "n", "zero_maps"], columns="metric", values="cell", aggfunc="first", sort=False
)

# %%
error, lines, empty = np.abs(probability - labels), [], []
for kind in list(groups)[3:]:
    members = np.flatnonzero(groups[kind])
    order = np.argsort(error[members], kind="stable")[:: 1 if "true" in kind else -1]
    chosen = members[order][:4]  # of the right answers the surest, of the wrong ones the worst
    titles = [f"p {probability[row]:.3f}, error {error[row]:.3f}" for row in chosen]
    pairs = zip(titles, chosen, strict=True)
    pictures = [figures.Picture(title, x[row], maps[row], alpha=0.4) for title, row in pairs]
    if len(members):
        lines.append((f"{kind}: {len(chosen)} of {len(members)} shown", pictures))
    else:
        empty.append(f"no {kind}")
about = f"p: of {study.dataset.classes[1]}; {run.caption}"
figure = figures.figure_grid(lines, "\n".join([about, *empty]))
report.save_figure(figure, run, "groups")
figure

# %% [markdown]
# ## 7 Shortcut audit
#
# DeGrave, Janizek and Lee ([2021](https://doi.org/10.1038/s42256-021-00338-7)) showed that networks for COVID images
# read the edges, markers and positions that betray the source, and fail in another hospital. A heat map does not prove
# the opposite: it shows where, not what. So parts of the images are taken away (replaced by the mean grey of the training
# images) and the question is asked twice:
#
# - **tested**: the trained model sees test images of which only the part is left. What does *this model* read?
# - **retrained**: a quick pipeline (the same frozen network, standardised features, logistic regression) is trained and
#   tested on the part. What do *the images* give away?
#
# The lungs are those of the database's masks where the copy has them; otherwise a crude box, and the text says so.
# Nothing is chosen by these numbers, so they are taken on test images, which the log records.

# %%
study = open_study(run)
name = "finetuned" if trained(study, ["finetuned"]) else "frozen"
model, start = load_models(study, [name, "start"]).values()
test_opened(study, "shortcut audit")
rng = np.random.default_rng(run.seed)
learnt, tested = (
    shortcuts.sample(study.dataset, study.cache, study.images(rows), rows)
    for rows in (
        np.sort(rng.permutation(study.rows("train"))[: run.audit_images]),
        study.rows("test"),
    )
)
print(
    f"lungs are {tested.lungs}; first line {study.dataset.classes[0]}, second "
    f"{study.dataset.classes[1]}"
)
shown = [int(np.flatnonzero(tested.y == label)[0]) for label in (0, 1)]
fill, x, masks = float(learnt.x.mean()), tested.x[shown], tested.masks[shown]
left = [shortcuts.limited(x, region, masks, fill=fill) for region in shortcuts.REGIONS]
figure = plots.figure_samples(
    torch.stack(left, 1).flatten(0, 1).cpu().numpy(),
    [region.replace("_", " ") for region in shortcuts.REGIONS] * 2,
    f"taken away: grey {fill:.2f}; {run.caption}",
    columns=len(left),
)
report.save_figure(figure, run, "regions")
figure

# %%
regions = stored(
    study,
    f"regions_{name}",
    lambda: shortcuts.region_accuracy(
        shortcuts.linear_probe(start.features),
        learnt,
        tested,
        model=model,
        draws=run.bootstrap_draws,
    ),
    model=[name, "start"],
    uses=["audit_images", "seed", "bootstrap_draws"],
)
for how, who in (("tested", name), ("retrained", "probe on frozen features")):
    part = regions[regions["how"].eq(how)]
    rows = part.assign(attack=f"audit, {how} on " + part["region"])
    report.update_results(
        report.result_rows(rows.filter(report.RESULT_COLUMNS), run, model=who), RESULTS
    )
cells = regions.assign(cell=[report.with_interval(row) for _, row in regions.iterrows()])
cells[cells["metric"].ne("balanced_accuracy")].pivot_table(
    index="region", columns=["how", "metric"], values="cell", aggfunc="first", sort=False
)

# %% [markdown]
# The same as a picture: the AUC of each region with its interval, in both forms; the dotted line is chance.

# %%
figure, axes = plots.panels(1, width=7.2, height=4.2)
shapes = {"tested": ("o", "trained on whole images"), "retrained": ("s", "trained on the region")}
auc = regions[regions["metric"].eq("auc")].set_index("region")
for number, (how, (shape, words)) in enumerate(shapes.items()):
    part = auc[auc["how"].eq(how)].loc[shortcuts.REGIONS]
    # A percentile interval may leave the value outside by a hair; a bar cannot be negative.
    ends = part["value"] - part["ci_low"], part["ci_high"] - part["value"]
    style = {"fmt": shape, "color": plots.COLORS[number], "capsize": 3, "label": words}
    place, bars = np.arange(len(part)) + 0.26 * number - 0.13, [end.clip(lower=0) for end in ends]
    axes[0, 0].errorbar(part["value"], place, xerr=bars, **style)
axes[0, 0].axvline(0.5, ls=":", color="0.4")
axes[0, 0].set_yticks(range(len(part)), [region.replace("_", " ") for region in part.index])
axes[0, 0].invert_yaxis()
axes[0, 0].set(xlabel="AUC on test images", xlim=(min(0.4, auc["ci_low"].min() - 0.03), 1.02))
figure.legend(loc="outside lower center", ncol=2, frameon=False)
figure.suptitle(f"What each region tells; {run.caption}", fontsize=9)
report.save_figure(figure, run, "audit")
figure

# %% [markdown]
# **A marker.** A small bright square, as a side marker or a sticker would be, is burnt into each corner in turn. An
# answer about lungs should not move.

# %%
marker = stored(
    study,
    f"marker_{name}",
    lambda: shortcuts.marker_test(model, tested, draws=run.bootstrap_draws),
    model=name,
    uses=["bootstrap_draws"],
)
cells = marker.assign(cell=[report.with_interval(row) for _, row in marker.iterrows()])
cells.pivot_table(index="place", columns="metric", values="cell", aggfunc="first", sort=False)

# %% [markdown]
# **Sources.** Where a copy of the data says which hospital or collection an image is from, the error of each is listed.
# If a source holds one class only, source and class cannot be told apart: they are the same question.

# %%
answers = pd.read_csv(made_by(run, "predictions.csv", "4 The test, opened once"))
table = study.dataset.manifest.loc[answers["image"]].reset_index(drop=True)
table["wrong"] = (answers[name] > 0.5) != (table["label"] == 1)
table["source"] = table["group"].replace("", "not known in this copy")
rows = []
for (source, label), part in table.groupby(["source", "class_name"]):
    error = metrics.share(part["wrong"], part["patient"], draws=run.bootstrap_draws)
    row = {"source": source, "class": label, "error": report.with_interval(error)}
    rows.append(row | {"images": len(part)})
pd.DataFrame(rows)

# %% [markdown]
# **What does the classifier read?** The sentences are written by code from the numbers above. A region *tells* the
# classes apart when the interval of its AUC lies above 0.5; blanked lungs leave their outline to be seen, so that they
# must beat the outline alone. With three regions outside the lungs and 95 % intervals, chance alone says so in at most
# one audit of thirteen.

# %%
auc = regions[regions["metric"].eq("auc")].set_index(["how", "region"])
outline = {how: row["ci_low"] > 0.5 for how, row in auc.xs("lung_shape", level="region").iterrows()}


def tells(how, *names):
    """Whether one of the regions tells the classes apart."""
    floor = {"lungs_blanked": auc.loc[(how, "lung_shape"), "value"] if outline[how] else 0.5}
    return any(auc.loc[(how, name), "ci_low"] > floor.get(name, 0.5) for name in names)


# %%
no_lung = " its answer is better than chance where no lung can be seen"
outside = auc[auc.index.get_level_values("region").isin(shortcuts.OUTSIDE)]
if tells("tested", *shortcuts.OUTSIDE) and not tells("tested", "lungs_only"):
    headline = f"**The model reads what lies outside the lungs:**{no_lung}, and not where only "
    headline += "the lungs can be seen."
elif tells("tested", *shortcuts.OUTSIDE):
    headline = f"**The model reads more than the lungs:**{no_lung}."
elif tells("retrained", *shortcuts.OUTSIDE):
    headline = "**The images offer a shortcut outside the lungs:** the classes can be told apart "
    headline += "there; this model shows no sign of reading it."
elif tells("tested", "lungs_only") or tells("retrained", "lungs_only"):
    headline = "**No sign of a shortcut outside the lungs:** the lungs alone tell the classes "
    headline += f"apart; outside, an AUC above {outside['ci_high'].max():.2f} can be excluded, "
    headline += "and no more."
else:
    headline = "**No region tells the classes apart,** so the images at hand do not show what is "
    headline += "read."

# %%
SHOWN = {
    "whole": "the whole image",
    "border_only": "the border alone",
    "corners_only": "the corners alone",
    "centre_only": "the image without its border",
    "lungs_only": "the lungs alone",
    "lungs_blanked": "the image with the lungs blanked",
    "lung_shape": "the outline of the lungs alone",
}
words = {"tested": "The model trained on whole images, shown", "retrained": "Trained and tested on"}
lines = [headline, ""]
for (how, region), row in auc.iterrows():
    lead, whole = row["value"] - 0.5, auc.loc[(how, "whole"), "value"] - 0.5
    remark = "no better than chance."
    if row["ci_high"] < 0.5:
        remark = "worse than chance: what was taken away turns the answers around."
    elif row["ci_low"] > 0.5 and region == "whole":
        remark = "better than chance."
    elif row["ci_low"] > 0.5 and whole > 0:
        remark = f"{lead / whole:.0%} of the whole image's lead over chance."
    elif row["ci_low"] > 0.5:
        remark = "better than chance, unlike the whole image."
    lines.append(f"- {words[how]} {SHOWN[region]}: AUC {report.with_interval(row)}, {remark}")

# %%
places = marker.set_index(["place", "metric"])
place = max(shortcuts.CORNERS, key=lambda corner: places.loc[(corner, "size_of_change"), "value"])
change, turned = places.loc[(place, "change")], places.loc[(place, "flips"), "value"]
one_way = change["ci_low"] > 0 or change["ci_high"] < 0
moves = "moves the answer" if one_way else "does not move the answer one way"
lines.append(
    f"- A bright square of {change['size']:.0%} of the side in a corner {moves}: most in the "
    f"{place}, P(class 1) {report.with_interval(change, signed=True)}; {turned:.1%} of the "
    f"answers turn there, {places.loc[('middle', 'flips'), 'value']:.1%} with the square in the "
    "middle."
)

# %%
energy = pd.read_csv(made_by(run, "energy.csv", "6 Right and wrong answers"))
every = energy[energy["group"].eq("all")].set_index("metric")
gain, share, area = every.loc["gain"], every.loc["energy", "value"], every.loc["area", "value"]
more = "more than" if gain["ci_low"] > 0 else "less than" if gain["ci_high"] < 0 else "about what"
zero = f" ({gain['zero_maps']:.0f} zero maps count as flat)" if gain["zero_maps"] else ""
lines.append(
    f"- {share:.1%} of the attribution lies inside the lungs, which cover {area:.1%} of the image: "
    f"{more} a map that knows nothing has{zero}."
)
lines += ["", f"Lungs are {tested.lungs}."]
if any(outline.values()):
    lines.append(
        "Their outline alone tells the classes apart and stays visible where lungs are cut out or "
        "blanked; border and corners are free of it."
    )
lines.append(
    "An image with a part taken away is unlike any that the model was trained on: that it fails "
    "there does not prove that it never reads the part that was left."
)
if run.synthetic:
    shown = "these sentences show the machinery, not a finding."
    lines.append(f"\n*Synthetic images and a tiny model: {shown}*")
conclusion = "\n".join(lines)
files.write_text(conclusion + "\n", run.run_dir / "conclusion.md")
Markdown(conclusion)

# %% [markdown]
# ## 8 Questions 13 to 24
#
# The assignment's questions on transfer learning and Grad-CAM. Every answer is written by code from this run's numbers;
# where the run does not support an answer, it says so. Questions 1 to 12 are answered in
# [notebook 06](06_covid_baseline.ipynb).
#
# | question | about | rests on section |
# |---|---|---|
# | 13 | the architecture of the new layers | 2 |
# | 14 | training curves against the baseline's | 2, 3, 4 |
# | 15 | did fine-tuning help, how small a rate | 3, 4 |
# | 16 | fine-tuned against baseline | 4 |
# | 17, 18 | advantages and disadvantages; what to do differently | 2, 3, 4, 7 |
# | 19 | a scalar output | 5 |
# | 20 | only two labels | 5 |
# | 21, 22, 23 | relevant areas, biases, misclassifications | 6, 7 |
# | 24 | more data | 6, 7 |

# %%
study = open_study(run)
name = "finetuned" if trained(study, ["finetuned"]) else "frozen"
paired = pd.read_csv(made_by(run, "paired_tests.csv", "4 The test, opened once")).set_index(
    ["model", "against"]
)
results = pd.read_csv(made_by(run, "results.csv", "4 The test, opened once")).set_index(
    ["model", "attack", "metric"]
)
heads = pd.read_csv(made_by(run, "heads.csv", "2 Frozen network, new head")).set_index("head")
attempts = pd.read_csv(made_by(run, "tuning/attempts.csv", "3 Fine-tuning the whole network"))
folders = {
    "baseline": baseline_folder(study) / "baseline",
    "frozen": made_by(run, "frozen_head/metrics.csv", "2 Frozen network, new head").parent,
}
folders |= {tuned: run.run_dir / tuned for tuned in trained(study, ["finetuned"])}
histories = {key: pd.read_csv(folder / "metrics.csv") for key, folder in folders.items()}
conclusion = (
    made_by(run, "conclusion.md", "7 Shortcut audit").read_text(encoding="utf-8").split("\n")[0]
)


def on_test(model, metric):
    return report.with_interval(results.loc[(model, "clean", metric)])


def difference(model, against):
    """A paired comparison in words."""
    row = paired.loc[(model, against)]
    verdict = (
        "a difference that these test images show"
        if row["p"] < 0.05
        else "no difference that these test images show"
    )
    auc = f"AUC {row['auc_difference']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
    return (
        f"only *{model}* is right on {row['only_it']:.0f} images, only *{against}* on "
        f"{row['only_other']:.0f} (McNemar "
        f"p = {row['p']:.2g}: {verdict}); {auc}"
    )


def curve(key):
    """The curve of a final training, which has no held-out images, in words."""
    first, last = histories[key].iloc[0], histories[key].iloc[-1]
    return (
        f"*{key}*: {last['epoch']:.0f} epochs, training accuracy {first['train_accuracy']:.3f} "
        "after the first and "
        f"{last['train_accuracy']:.3f} after the last, loss {first['train_loss']:.3f} to "
        f"{last['train_loss']:.3f}"
    )


# %%
last, gain = attempts.iloc[-1], attempts["outcome"].eq("gain").any()
fell = ", ".join(
    f"{lr:g}" for lr in attempts.loc[attempts["outcome"].isin(["drop", "diverged"]), "lr"]
)
compared = "; ".join(
    f"*{head}* ({row['weights']:.0f} weights): validation loss {row['val_loss']:.3f}, AUC "
    f"{row['val_auc']:.3f}"
    for head, row in heads.iterrows()
)
if gain:
    tuning = (
        f"On validation images, yes: the loss fell from {last['baseline_val_loss']:.3f} to "
        f"{last['val_loss']:.3f} at rate "
        f"{last['lr']:g}. On test images: {difference('finetuned', 'frozen')}."
    )
else:
    tuning = (
        "No: no attempt had a better validation loss than the frozen model, which was kept "
        "(outcomes: "
        f"{', '.join(attempts['outcome'])})."
    )
tuning += f" Rates at which the training accuracy fell: {fell or 'none of those tried'}."
answers = {
    13: f"By validation images, with the same settings for both: {compared}. "
    f"*{heads['val_loss'].idxmin()}* went on. Dropout "
    "stands before the last layer of either; its rate was searched.",
    14: f"The final trainings (figure in section 4): {'; '.join(map(curve, histories))}. The head "
    "starts from features that "
    "exist already, the baseline from noise. Mind that the head saw images as they are, the others "
    "augmented ones.",
    15: tuning,
    16: f"Accuracy {on_test(name, 'accuracy')} against {on_test('baseline', 'accuracy')}, AUC "
    f"{on_test(name, 'auc')} against "
    f"{on_test('baseline', 'auc')}: {difference(name, 'baseline')}.",
}
Markdown("\n\n".join(f"**Question {number}.** {text}" for number, text in answers.items()))

# %%
kept = {
    key: models.load(folder / "best.pt")
    for key, folder in {"baseline": folders["baseline"], "frozen": run.run_dir / "frozen"}.items()
}
size = {key: sum(p.numel() for p in model.parameters()) for key, model in kept.items()}
spent = {key: history["seconds"].sum() for key, history in histories.items()}
extracting = sum(
    torch.load(path, weights_only=True)["seconds"]
    for path in (run.run_dir / "features").glob("*.pt")
)
answers = {
    17: f"For: the final head learnt in {spent['frozen']:.0f} s, after {extracting:.0f} s for the "
    "features of all images but the "
    f"test's, where the final baseline took {spent['baseline']:.0f} s; test accuracy "
    f"{on_test('frozen', 'accuracy')} and "
    f"{on_test('baseline', 'accuracy')}. Against: every image passes {size['frozen']:,} weights "
    "instead of "
    f"{size['baseline']:,}, and features computed once know no augmentation"
    + (f". Fine-tuning took {spent['finetuned']:.0f} s more." if gain else "."),
    18: "This run compared two heads, and training "
    + ("all blocks" if run.unfrozen == "all" else f"the last {run.unfrozen} blocks")
    + " against training none. Features learnt from radiographs, larger images and blocks set free "
    "one after the other were "
    "not tried, so nothing is claimed about them. What the audit says matters more than any of "
    f"these: {conclusion}",
}
Markdown("\n\n".join(f"**Question {number}.** {text}" for number, text in answers.items()))

# %%
made_in = {
    "gradcam_checks": "5 Grad-CAM from scratch",
    "gradcam_sides": "5 Grad-CAM from scratch",
    "energy": "6 Right and wrong answers",
}
checks, sides, energy = (
    pd.read_csv(made_by(run, f"{what}.csv", section)) for what, section in made_in.items()
)
gains = energy[energy["metric"].eq("gain")].set_index("group")
scalar, sides = checks[checks["map"].str.startswith("one logit")], sides.iloc[0]
rank, every = sides["rank correlation of z1 and z1 - z0"], gains.loc["all"]


def gain_of(group):
    value, low, high = gains.loc[group, ["value", "ci_low", "ci_high"]]
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


where = "no more inside the lungs than a map that knows nothing"
if every["ci_low"] > 0:
    where = "more inside the lungs than their area explains"
elif every["ci_high"] < 0:
    where = "LESS inside the lungs than their area explains"
answers = {
    19: f"Yes: class *{study.dataset.classes[0]}* is explained by $-z$. Against captum and "
    "against the two logits $(-z, z)$ "
    f"the maps differ by at most {scalar['difference'].max():.1e} of their maximum, in "
    f"{len(scalar)} comparisons.",
    20: "Yes. The maps of the two classes are one sum with opposite signs: "
    f"{sides['places above zero in both maps']:.1%} of "
    "the places speak for both, and *not COVID* is the only thing that *Normal* can mean. "
    + (
        "Raw logit and difference could not be compared here: their maps are zero."
        if np.isnan(rank)
        else "Explaining the raw logit instead of the difference is another question: rank "
        f"correlation {rank:.2f}."
    ),
    21: f"The maps lie {where}: energy minus area {gain_of('all')}, {every['zero_maps']:.0f} of "
    f"{every['n']:.0f} maps zero. "
    "Whether they lie on *opacities* cannot be judged: nobody has marked any in these images.",
}
Markdown("\n\n".join(f"**Question {number}.** {text}" for number, text in answers.items()))

# %%
auc = (
    stored(study, f"regions_{name}", model=[name, "start"], section="7 Shortcut audit")
    .query("metric == 'auc'")
    .set_index(["how", "region"])
)
blanked = {how: auc.loc[(how, "lungs_blanked")] for how in ("tested", "retrained")}
outline = {
    how: auc.loc[(how, "lung_shape")] for how in blanked
}  # still to be seen where the lungs are blanked
floor = {how: row["value"] if row["ci_low"] > 0.5 else 0.5 for how, row in outline.items()}
told = {
    how: any(
        auc.loc[(how, region), "ci_low"] > (floor[how] if region == "lungs_blanked" else 0.5)
        for region in shortcuts.OUTSIDE
    )
    for how in blanked
}
misread = int(gains["n"].get("wrong", 0))
if misread:
    low, high = gains.loc["wrong", ["ci_low", "ci_high"]]
    alike = misread < 20 or low <= gains.loc["right", "value"] <= high
    errors = (
        f"Of the {misread} misread images the maps have {gain_of('wrong')} of energy inside the "
        "lungs above their area, of "
        f"the others {gain_of('right')}: "
        + (
            "no difference that so few images can show, so the maps do not explain the errors."
            if alike
            else "wrong answers look elsewhere, which is a lead, not a cause."
        )
    )
answers = {
    22: f"{conclusion} With the lungs blanked, AUC is {report.with_interval(blanked['tested'])} "
    "for this model and "
    f"{report.with_interval(blanked['retrained'])} for one trained so. "
    + (
        "Grad-CAM by itself would have hidden it: its maps favour the lungs."
        if told["tested"] and every["ci_low"] > 0
        else "That is the audit's evidence; a heat map proves neither side."
    ),
    23: errors if misread else "No test image was misread, so there is nothing to explain.",
    24: "Not because of Grad-CAM alone. By maps and audit together: "
    + (
        "take both classes from the same places, and crop or mask the images, because what lies "
        "outside the lungs tells the "
        "classes apart."
        if told["tested"] or told["retrained"]
        else "take more images like the misread ones; outside the lungs nothing was found that "
        "tells the classes apart."
    )
    + " And have opacities marked in a test set: without that question 21 stays open.",
}
Markdown("\n\n".join(f"**Question {number}.** {text}" for number, text in answers.items()))

# %% [markdown]
# ## Results and files

# %%
results = pd.read_csv(made_by(run, "results.csv", "4 The test, opened once"))
shown = results[
    results["metric"].isin(["accuracy", "auc", "sensitivity", "specificity"])
    & results["attack"].eq("clean")
]
cells = shown.assign(cell=[report.with_interval(row) for _, row in shown.iterrows()])
display(
    cells.pivot_table(index="model", columns="metric", values="cell", aggfunc="first", sort=False)
)
display(pd.read_csv(made_by(run, "test_log.csv", "4 The test, opened once"))[["time", "purpose"]])
written = sorted(
    p.relative_to(run.run_dir).as_posix() for p in run.run_dir.rglob("*") if p.is_file()
)
print(f"{len(written)} files in {run.run_dir.parent.name}/{run.run_dir.name}:")
print("\n".join(name for name in written if "tables/" not in name))
