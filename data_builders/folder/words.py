"""The words by which folders and files of pictures are named, in seven languages.

A name is compared without case, accents and the form of its Unicode; `_`, `-`, `.` and spaces are
one. `meaning` reads whole names and the words inside them, as in normal_test or ok_front.
"""

import re
import unicodedata

GOOD, BAD, TRAIN, TEST, MASK, NEUTRAL, UNKNOWN = (
    "good", "bad", "train", "test", "mask", "neutral", "unknown",
)  # fmt: skip

# Kind -> words, a line a language: English, German, Chinese, Japanese, Korean, Spanish, French.
_TABLE = {
    GOOD: """
        good, goods, ok, okay, normal, normals, fine, pass, passed, accepted, conforming, flawless,
        intact, undamaged, healthy, defect free, defectfree, no defect, no defects, non defective,
        nondefective, without defect, without defects, no anomaly, non anomalous, anomaly free
        gut, gute, gutteil, gutteile, i o, io, in ordnung, fehlerfrei, ohne fehler, einwandfrei
        良品, 正常, 合格, 合格品, 无缺陷, 無缺陷, 无异常, 無異常, 无瑕疵, 無瑕疵, 完好, 好, 好的
        良品, 正常, 正常品, 合格, 合格品, 異常なし, 欠陥なし, 無欠陥, 無異常, 良
        정상, 양품, 합격, 합격품, 양호, 무결함
        bueno, buena, buenos, buenas, correcto, correctos, normales, conforme, conformes,
        sin defecto, sin defectos, aceptado, aceptados
        bon, bonne, bons, bonnes, conforme, conformes, sans defaut, sans defauts, normaux, sain
    """,
    BAD: """
        bad, ng, nok, ko, n g, not ok, not good, no good, fail, failed, failure, reject, rejected,
        rejects, def, defect, defects, defective, defectives, defected, anomaly, anomalies,
        anomalous, abnormal, abnormals, abnormality, fault, faults, faulty, nonconforming, flawed
        schlecht, schlechtteil, schlechtteile, defekt, defekte, defekten, fehler, fehlerhaft,
        fehlerhafte, mangel, mangelhaft, ausschuss, anomalie, anomalien, n i o, nio,
        nicht in ordnung
        不良, 不良品, 缺陷, 有缺陷, 异常, 異常, 次品, 坏, 坏的, 坏件, 不合格, 不合格品, 瑕疵, 废品
        不良, 不良品, 異常, 異常品, 欠陥, 欠陥品, 不合格, 不合格品
        불량, 불량품, 결함, 이상, 비정상, 불합격, 불합격품
        malo, mala, malos, malas, defecto, defectos, defectuoso, defectuosa, defectuosos,
        defectuosas, anomalia, anomalias, anormal, anormales, rechazado, rechazados, no conforme
        mauvais, mauvaise, defaut, defauts, defectueux, defectueuse, anomalie, anormal, rebut,
        rebuts, non conforme, non conformes
    """,
    TRAIN: """
        train, training, trains, trainset, trainingset, trn, val, valid, validation, support
        lernen, trainingsdaten, validierung
        训练, 訓練, 训练集, 验证, 验证集
        学習, 訓練, 検証, 学習用, トレーニング
        훈련, 학습, 검증
        entrenamiento, entrenar, validacion
        entrainement, apprentissage
    """,
    TEST: """
        test, tests, testing, testset, test public, query, queries, eval, evaluation, inference
        prufung, pruefung, testdaten, auswertung
        测试, 測試, 测试集, 评估
        テスト, 試験, 評価
        테스트, 시험, 평가
        prueba, pruebas, evaluacion
        essai, essais
    """,
    MASK: """
        ground truth, ground truths, groundtruth, groundtruths, gt, gts, mask, masks, label, labels,
        annotation, annotations, segmentation, segmentations, seg, pixel truth, label image
        maske, masken, annotationen, beschriftung
        掩码, 掩膜, 掩模, 标注, 標註, 标签, 蒙版
        マスク, ラベル, アノテーション, 正解
        마스크, 라벨, 정답, 주석
        mascara, mascaras, etiqueta, etiquetas, anotacion, anotaciones
        masque, masques, etiquette, etiquettes, verite terrain
    """,
    NEUTRAL: """
        image, images, img, imgs, picture, pictures, photo, photos, data, rgb, sample, samples,
        parts, set, dataset
        bild, bilder, daten, teil, teile
        图像, 图片, 照片, 数据, 样本, 品, 件
        画像, 写真, データ
        이미지, 사진, 데이터
        imagen, imagenes, foto, fotos, datos
        donnees
    """,
    UNKNOWN: """
        test private, private, unlabeled, unlabelled, unsorted, undecided
        ungepruft, unsortiert
        未标注, 未分类
        未分類
        미분류
        sin clasificar
        non classe
    """,
}
_LATIN_MARKS = re.compile("[\u0300-\u036f]")
_SEPARATORS = re.compile(r"[\s_\-.,()\[\]+&]+")
_DIGITS = re.compile(r"(?<=\D)(?=\d)|(?<=\d)(?=\D)")
_LONGEST = 3  # words of a phrase


def plain(name: str) -> str:
    """A name without case, accents and form of Unicode; separators become one space."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", name).casefold())
    text = unicodedata.normalize("NFC", _LATIN_MARKS.sub("", text))
    return _SEPARATORS.sub(" ", text).strip()


def same(name: str) -> str:
    """A name as it is compared with another name of a file: any case and form of Unicode."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", name).casefold())


def _read(table: dict[str, str]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for kind, text in table.items():
        for word in re.split(r",|\n", text):
            if plain(word):
                found.setdefault(plain(word), set()).add(kind)
    return {word: frozenset(kinds) for word, kinds in found.items()}


KINDS = _read(_TABLE)  # word -> its kinds
_UNSPACED = sorted((w for w in KINDS if not w.isascii() and ord(w[0]) > 0x2E80), key=len)[::-1]


def meaning(name: str) -> tuple[frozenset[str], bool]:
    """The meaning of a folder's name.

    Returns:
      (kinds, whether the whole name is a word of the table). No kind if the name says nothing, or
      contradicts itself.
    """
    text = plain(name)
    if text in KINDS:
        return KINDS[text], True
    kinds, rest = _inside(_DIGITS.sub(" ", text).split())
    if {GOOD, BAD} <= kinds or {TRAIN, TEST} <= kinds:
        return frozenset(), False
    if MASK in kinds and (rest or _is_label_of(kinds, text)):  # a torn label is no mask
        kinds -= {MASK}
    return frozenset(kinds), not rest and not any(w.isdigit() for w in text.split())


def _is_label_of(kinds: set[str], text: str) -> bool:
    return bool(kinds & {GOOD, BAD}) and "mask" not in text and "gt" not in text.split()


def _inside(tokens: list[str]) -> tuple[set[str], list[str]]:
    """(kinds of the words inside a name, what is left over)."""
    kinds: set[str] = set()
    rest, start = [], 0
    while start < len(tokens):
        for end in range(min(len(tokens), start + _LONGEST), start, -1):
            phrase = " ".join(tokens[start:end])
            if phrase in KINDS:
                kinds |= KINDS[phrase]
                start = end
                break
        else:
            found, left = _unspaced(tokens[start])
            kinds |= found
            rest += [left] if left and not left.isdigit() else []
            start += 1
    return kinds, rest


def _unspaced(token: str) -> tuple[set[str], str]:
    """The same inside a name of a script without spaces; long words first: 不良品 holds 良品."""
    kinds: set[str] = set()
    for word in _UNSPACED:
        if word in token and (len(word) > 1 or token == word):
            kinds |= KINDS[word]
            token = token.replace(word, "")
    return kinds, token


_WORDS_OF_MASKS = "|".join(
    sorted((re.escape(w).replace(r"\ ", r"[\s_\-.]*") for w, k in KINDS.items() if MASK in k),
           key=len, reverse=True)
)  # fmt: skip
_AFTER = re.compile(rf"(.+?)[\s_\-.]+(?:{_WORDS_OF_MASKS})", re.IGNORECASE)
_BEFORE = re.compile(rf"(?:{_WORDS_OF_MASKS})[\s_\-.]+(.+)", re.IGNORECASE)


def base_stem(stem: str) -> str:
    """The stem of the picture that a mask belongs to by its name, compared as `same` makes it."""
    text = same(stem)
    match = _AFTER.fullmatch(text) or _BEFORE.fullmatch(text)
    return match[1] if match else text
