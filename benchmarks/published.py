"""What the paper prints, under its own protocol: PSNR (dB) / SSIM, and cost."""

from __future__ import annotations

TABLE1 = {
    "table1_lr_local": "41.75 / .9899",
    "table1_lr_global": "41.91 / .9902",
    "table1_modulator": "42.06 / .9904",
    "table1_ref_global": "42.25 / .9908",
    "table1_ref_local": "42.35 / .9909",
    "table1_fusion": "42.43 / .9910",
    "table1_edge_loss": "42.58 / .9912",
    "table1_guided": "–",  # ours
}
TABLE2_COLUMNS = {2: (0, 2), 4: (1, 3)}  # of the rows below, at each factor
TABLE2_SETS = ("BraTS2021", "IXI")
TABLE2 = {  # BraTS2021 2x, BraTS2021 4x, IXI 2x, IXI 4x
    "SRCNN": ("37.88 / .9794", "30.44 / .9130", "29.23 / .8649", "28.12 / .8357"),
    "T2Net": ("39.72 / .9850", "32.48 / .9262", "31.31 / .9035", "29.73 / .8773"),
    "DiVANet": ("41.05 / .9886", "34.31 / .9498", "33.15 / .9320", "30.46 / .8946"),
    "MSHTNet": ("39.45 / .9841", "33.83 / .9442", "32.77 / .9276", "30.44 / .8963"),
    "McMRSR": ("40.28 / .9884", "34.72 / .9557", "36.08 / .9624", "33.51 / .9511"),
    "MINet": ("41.07 / .9887", "34.83 / .9563", "36.22 / .9618", "35.99 / .9607"),
    "WavTrans": ("42.02 / .9904", "35.74 / .9655", "38.77 / .9740", "37.99 / .9708"),
    "SANet": ("41.39 / .9893", "34.94 / .9577", "37.20 / .9683", "36.01 / .9604"),
    "GLMamba": ("42.58 / .9912", "36.75 / .9696", "39.47 / .9763", "38.23 / .9717"),
}
TABLE4 = {  # parameters (M) / FLOPs (G), by the paper's way of counting
    "MINet": "5.828 / 327.05",
    "WavTrans": "2.04 / 63.89",
    "SANet": "7.187 / 404.7",
    "GLMamba": "1.187 / 32.27",
}
PUBLISHED_AS = {"srcnn": "SRCNN", "glmamba_paper": "GLMamba"}
