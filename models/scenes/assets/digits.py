"""Makes `digits.pgm` from the handwritten digits that scikit-learn ships.

    pip download --no-deps scikit-learn==1.9.1
    python digits.py scikit_learn-1.9.1-*.whl

Data: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository (CC BY 4.0); 1797 digits of 8 x 8 pixels and 17 grey levels by 13 writers.

The sheet is 32 digits wide, ordered by digit, then as in the file; a grey level v is the pixel 255 v / 16
(rounded). Prints how many there are of each digit.
"""

import gzip
import sys
import zipfile

import numpy as np

WIDTH = 32
wheel = zipfile.ZipFile(sys.argv[1])
table = gzip.decompress(wheel.read("sklearn/datasets/data/digits.csv.gz")).decode()
rows = np.array([[int(float(v)) for v in line.split(",")] for line in table.splitlines()])
rows = rows[np.argsort(rows[:, -1], kind="stable")]
sheet = np.zeros((-(-len(rows) // WIDTH) * 8, WIDTH * 8), np.uint8)
for index, row in enumerate(rows):
    y, x = index // WIDTH * 8, index % WIDTH * 8
    sheet[y : y + 8, x : x + 8] = np.round(row[:64].reshape(8, 8) * 255 / 16)
with open("digits.pgm", "wb") as file:
    file.write(b"P5\n%d %d\n255\n" % (sheet.shape[1], sheet.shape[0]))
    file.write(sheet.tobytes())
print(np.bincount(rows[:, -1]).tolist())
