"""The tokens of pycocoevalcap's PTBTokenizer, without Java: caption scores compare only where the
tokens are the same.

Captions -> their tokens. The rules were fitted by asking Stanford's PTBTokenizer 3.4.1
(-preserveLines -lowerCase) about words, characters and random strings, and are held to it by
tests/data/ptb; what pycocoevalcap removes is removed. Like the original this is a longest-match
lexer: of all rules the one that sees furthest, lookahead included, takes its token; of equals the
first. It reads the captions as lines of one text, so that in "200 N." the period of an initial
belongs to it or not by the first word of the *next* caption: their order matters, as it does
officially. Known to differ: letters that entered Unicode after 6.0, and line separators inside a
caption (a line break for the original, which then shifts all captions that follow; a space here).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

REMOVED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
# Not "-lrb-" and its like: the official list has them in capitals, so that lower-cased brackets
# stay.

# ---- characters ----------------------------------------------------------------------------------

_SPACE = "[ \t\xa0\u2000-\u200a\u3000]"
_BLANK = "[ \t\xa0\u2000-\u200a\u3000\n]"
# The original knows the basic plane only: an emoji ends a word and vanishes. Numerals such as "²"
# are no letters.
_NO_LETTERS = "_\U00010000-\U0010ffff" + "".join(
    chr(c) for c in range(0x80, 0x10000) if unicodedata.category(chr(c)) in ("No", "Nl")
)
_DIGIT = "[^\\D\U00010000-\U0010ffff]"
_ALNUM = rf"[^\W{_NO_LETTERS}]"
_ALPHA = rf"[^\W\d{_NO_LETTERS}]"
# Marks that count as letters inside a word: soft hyphen, combining accents, and some signs of other
# scripts.
_MARKS = (
    "\xad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0378\u0379\u0384\u0385\u03f6\u0483-\u0487"
    "\xad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0378\u0379\u0384\u0385\u03f6\u0483-\u0487"
    "\u055a-\u055f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4"
    "\u055a-\u055f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4"
    "\u06e7-\u06ed\u06fd\u06fe\u070f\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c\u093e-\u094e"
    "\u06e7-\u06ed\u06fd\u06fe\u070f\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c\u093e-\u094e"
    "\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc\u09be-\u09c4\u09c7\u09c8\u09cb-\u09cd\u09d7\u09e2\u09e3"
    "\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc\u09be-\u09c4\u09c7\u09c8\u09cb-\u09cd\u09d7\u09e2\u09e3"
    "\u0a01-\u0a03\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd"
    "\u0a01-\u0a03\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd"
    "\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc"
    "\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc"
    "\u0ec8-\u0ecd"
)
_ENTITY_LETTER = "&[aeiouAEIOU](?:acute|grave|uml);"
_L = rf"(?:{_ALPHA}|[{_MARKS}]|{_ENTITY_LETTER})"
_LD = rf"(?:{_ALNUM}|[{_MARKS}]|{_ENTITY_LETTER})"
# Signs that are tokens of their own; what is neither here nor in any other rule vanishes.
_SIGNS = (
    r"%&*+/<=>@\\^_|~\xa1\xa5-\xa9\xac\xae-\xb4\xb6-\xb9\xbf\xd7\xf7\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6"
    r"\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8"
    r"\u0964\u0965\u0e3f\u0e4f\u1fbd\u2016\u2017\u201a\u201e-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u2070"
    r"\u2074-\u207e\u2080-\u208e\u20a4\u2100\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123\u2125"
    r"\u2127\u2129\u212e\u213a\u213b\u2140-\u2144\u214a-\u214d\u214f\u2155-\u215e\u2190-\u2bff\u3001\u3002\u3012"
    r"\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
)
_APOS = "(?:['\x92\u2019]|&apos;)"
_APOS_OR_BACKTICK = "(?:['\x92\u2019`\x91\u2018\u201b]|&apos;)"

# ---- words ---------------------------------------------------------------------------------------


def _any_case(pattern: str) -> str:
    return f"(?i:{pattern})"


def _words(text: str) -> str:
    return _any_case("|".join(text.split()))


_WORD = rf"{_L}{_LD}*(?:[.!?]{_L}{_LD}*)*"
_PART = rf"(?:[dDlLoO]{_APOS_OR_BACKTICK}{_ALNUM})?{_ALNUM}+"
_HYPHENATED = rf"{_PART}(?:[-_\u058a\u2010\u2011]{_PART})*"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
_DOTTED = rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:{_ACRONYM}\.|[A-Za-z0-9\xad]+))+"
# A capital in (?-i:...) is needed: "Miss." is a state, "miss." the end of a sentence.
_LOOSE_ABBREVIATIONS = _words(  # may end a sentence
    r"""
    ala al apr ariz assn aug bancorp bhd bldg blvd bros calif colo cos? conn corp ct dak dec esq
    est etc ext feb fla fri ga inc ind intl jan jr jul jun kans? ky ltd mar md mich minn mont mon
    mo neb nev nov oct okla penn plc pp?t(?-i:[ye])s? rd rt sept? seq sq sr sys tel tenn thurs thu
    tues? univ va vt wed wisc? wyo (?:ed|ph)\.d (?-i:A)rk (?-i:A)z (?-i:D)el (?-i:I)ll (?-i:L)a
    (?-i:M)ass (?-i:M)iss (?-i:O)re (?-i:P)a (?-i:T)ex (?-i:W)ash
    """
)
_TIGHT_ABBREVIATIONS = _words(  # stand before a name
    r"""
    adj adm adv alex assoc asst attys? ave brig capt cf cie co?mdr col cpl dept det drs? elec ens
    ft gen govs? hon insp invt jos lieut lt maj messrs m(?-i:[ft])g mlle mme mrs mr msgr ms mt
    natl pfc ph pres profs? pvt reps? rev sens? sfc sgt spc ste? supts? treas vs wm a\.k\.a
    """
)
_BEFORE_NUMBERS = _words("art ca figs? nos? op pp prop")
# After an initial these words begin a sentence, so that its period is not its own.
_STARTS = "|".join(
    f"{word}|{word.upper()}"
    for word in re.findall(
        r"\S+",
        r"""
        A About According Additionally After An As At But Earlier He Her Here However If In It
        Last Many More Mr\. Ms\. Now Once One Other Our She Since So Some Such That The Their Then
        There These They This We What When While Yet You
        """,
    )
)
_TAG_NAME = r"[A-Za-z][A-Za-z0-9_:.-]*"
_TAG = (
    rf"<(?:[!?][A-Za-z-][^>\n]*|/{_TAG_NAME}|"
    rf"{_TAG_NAME}(?: +(?:{_TAG_NAME} *= *(?:'[^'\n]*'|\"[^\"\n]*\"|{_TAG_NAME})"
    rf"|{_TAG_NAME}))* */?) *>"
)
_URL_PATH = r"(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-])?"
_NUMBER = rf"(?:{_DIGIT}*(?:[.:,\xad\u066b\u066c]{_DIGIT}+)+|{_DIGIT}+)"
_FILE_KINDS = _any_case(
    "bat|bmp|class|cgi|cpp|c|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|"
    "bat|bmp|class|cgi|cpp|c|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|"
    "wav|xml|x|zip"
)
_AUXILIARY = _APOS + _any_case("[msd]|re|ve|ll")
_NOT = _any_case("n") + _APOS_OR_BACKTICK + _any_case("t")
_PHONE = (
    r"(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])"
    r"[0-9]{3,4}[- \xa0]?[0-9]{3,5}|"
    r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"
)
_EMAIL = (
    r"(?:<|&lt;)?[a-zA-Z0-9][^ \t\n\f\r\"<>|(){}\xa0]*@(?:[^ \t\n\f\r\"<>|(){}.\xa0]+\.)*"
    r"[^ \t\n\f\r\"<>|(){}.\xa0]+(?:>|&gt;)?"
)
_FRACTION = rf"(?:{_DIGIT}{{1,4}}[- \xa0])?{_DIGIT}{{1,4}}(?:\\?/|\u2044){_DIGIT}{{1,4}}"

# (kind, pattern): the token is group 1 where there is one; what follows it is lookahead.
_RULES = (
    ("word", f"({_any_case('can')}){_any_case('not')}"),
    ("word", f"({_any_case('gon|wan')}){_any_case('na')}"),
    ("word", f"({_any_case('got')}){_any_case('ta')}"),
    ("word", f"({_any_case('lem|gim')}){_any_case('me')}"),
    ("word", f"('{_any_case('t')}){_any_case('is|was')}"),
    ("spaced", _TAG),
    ("word", f"({_WORD}){_AUXILIARY}"),
    ("word", rf"([A-Za-z]*[A-MO-Za-mo-z]\xad*){_NOT}"),
    ("word", _WORD),
    ("as is", f"{_APOS}[nN]{_APOS}|('[nN])(?:{_BLANK}|$)|\u2019[nN]"),
    (
        "as is",
        f"{_any_case('[ldj]|dunkin|somethin|ol')}{_APOS}|{_APOS}{_any_case('em|till?|cause')}|{_APOS}[2-9]0[sS]"
        f"{_any_case('[ldj]|dunkin|somethin|ol')}{_APOS}|{_APOS}{_any_case('em|till?|cause')}|{_APOS}[2-9]0[sS]",
    ),
    ("as is", rf"[A-HJ-XZn]{_APOS_OR_BACKTICK}{_ALPHA}{{2,}}"),
    ("as is", rf"{_ALPHA}+[aeiouyAEIOUY]{_APOS_OR_BACKTICK}[aeiouA-Z]{_ALPHA}*"),
    ("word", _any_case(r"cont'd\.?|'twas|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l")),
    ("as is", f"([yY]{_APOS}){_ALPHA}"),
    ("as is", r"(?i:https?)://[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-]"),
    ("as is", rf"(?i:www)\.(?:[^ \t\n\f\r\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}{_URL_PATH}"),
    (
        "as is",
        rf"(?:[^ \t\n\f\r\"`'<>|.!?(){{}},-_$]+\.)+{_any_case('com|net|org|edu')}{_URL_PATH}",
    ),
    ("as is", _EMAIL),
    ("as is", "[@\uff20][a-zA-Z_][a-zA-Z_0-9]*"),
    ("as is", f"[#\uff03]{_L}+"),
    ("word", f"({_AUXILIARY})(?:[^A-Za-z]|$)|[\x92\u2019]{_any_case('[msd]|re|ve|ll')}"),
    ("word", _NOT),
    ("word", rf"{_DIGIT}{{1,2}}[-/]{_DIGIT}{{1,2}}[-/]{_DIGIT}{{2,4}}"),
    ("word", rf"[-+]?{_NUMBER}"),
    ("word", "[\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    ("spaced", _FRACTION),
    ("as is", _any_case(r"-[lr][rcs]b-|C\.D\.s|pro-|anti-|S&P-500|S&Ls")),
    ("as is", _any_case(f"Cap{_APOS}n|c{_APOS}est")),
    ("as is", rf"({_APOS}[0-9][0-9]){_BLANK}"),
    ("as is", _HYPHENATED),
    ("word", r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"),
    ("word", r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"),
    ("word", rf"({_LOOSE_ABBREVIATIONS}\.)(?s:..)"),
    ("word", _DOTTED),
    ("word", rf"(?:{_LOOSE_ABBREVIATIONS}|{_TIGHT_ABBREVIATIONS}|{_ACRONYM}|[A-Za-z])\."),
    ("word", rf"({_LD}+(?:\.{_LD}+)*\.{_FILE_KINDS})(?:{_BLANK}|[.,?!])"),
    ("word", rf"([A-Za-z])\.{_BLANK}+(?:{_STARTS}|{_TAG}){_BLANK}"),
    ("word", rf"({_BEFORE_NUMBERS}\.){_BLANK}?{_DIGIT}"),
    ("word", rf"((?:{_HYPHENATED}|{_DOTTED}|{_WORD})\.)[,;:\u3001]"),
    ("spaced", _PHONE),
    ("smile", r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]"),
    ("smile", r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)"),
    ("word", r"[A-Z]*\$|[\xa2-\xa4\x80\u20a0\u20ac]|[\xbc\xbd\xbe\u2153\u2154]"),
    (
        "removed",
        r"&(?:MD|mdash|ndash);|[\x96\x97\u2013-\u2015]|-{1,4}|\.{3,}|\.(?:[ \xa0]\.){2,4}|\u2026",
    ),
    (
        "removed",
        "[.,;:]|''|``|[\"'`\x91-\x94\u2018\u2019\u201b-\u201d\u2039\u203a\xab\xbb]|&(?:quot|apos|nbsp);"
        "[.,;:]|''|``|[\"'`\x91-\x94\u2018\u2019\u201b-\u201d\u2039\u203a\xab\xbb]|&(?:quot|apos|nbsp);",
    ),
    ("word", r"[?!]+"),
    ("quotes", "[`\x91-\x94\u2018-\u201f\u2039\u203a\xab\xbb]{2}"),
    ("word", "&(?:amp|lt|gt);"),
    ("as is", "&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);"),
    ("bracket", r"[()\[\]{}]"),
    ("as is", rf"[cf]#|[CF]#|[cC]\+\+|\\\*|[*]+|[#]+|_+|@+|-{{5,}}|<<|>>|[{_SIGNS}]"),
)
_COMPILED = [(kind, re.compile(pattern)) for kind, pattern in _RULES]
# Most of a caption is this, and no other rule sees further; the words that the first rules cut are
# left to them.
_PLAIN = re.compile(r"(?!(?i:cannot|gonna|wanna|gotta|lemme|gimme)\b)[A-Za-z]+(?=,? |\n)")

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DOUBLE_QUOTES = str.maketrans(
    dict.fromkeys("\x93\u201c\xab", "``") | dict.fromkeys("\x94\u201d\xbb", "''")
)
_QUOTES = str.maketrans(
    dict.fromkeys("\x91\u2018\u201b\u2039", "`") | dict.fromkeys("\x92\u2019\u203a", "'")
)
_WHOLE = {
    "\xa2": "cents", "\xa3": "#", "\xa4": "$", "\x80": "$", "\u20a0": "$", "\u20ac": "$",
    "\xbc": "1/4", "\xbd": "1/2", "\xbe": "3/4", "\u2153": "1/3", "\u2154": "2/3",
    "&lt;": "<", "&gt;": ">",
}  # fmt: skip


def _written(kind: str, token: str) -> str:
    """Returns the token as the original writes it, in lower case."""
    if kind == "bracket":
        return _BRACKETS[token]
    if kind == "quotes":
        return token.translate(_DOUBLE_QUOTES).translate(_QUOTES)
    if kind in ("smile", "spaced"):
        token = token.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\xa0")
    if kind == "word":
        token = _WHOLE.get(token, token).translate(_QUOTES)
        token = token.replace("&apos;", "'").replace("&amp;", "&").replace("\xad", "") or "-"
    return token.lower()


def tokenise(captions: Sequence[str]) -> list[str]:
    """Returns each caption's tokens, joined by spaces as pycocoevalcap does (a token may hold a
    no-break space).
    """
    text = "\n".join(
        " ".join(re.split("[\n\r\x0b\x0c\x85\u2028\u2029]", caption)) for caption in captions
    )
    lines: list[list[str]] = [[]]
    position = 0
    while position < len(text):
        if text[position] == "\n":
            lines.append([])
            position += 1
            continue
        if plain := _PLAIN.match(text, position):
            lines[-1].append(plain[0].lower())
            position = plain.end()
            continue
        longest, kind = None, ""
        if text[position] != " ":
            for name, rule in _COMPILED:
                found = rule.match(text, position)
                if found and (longest is None or found.end() > longest.end()):
                    longest, kind = found, name
        if longest is None:
            position += 1
            continue
        end = longest.end(longest.lastindex or 0)
        if kind != "removed":
            lines[-1] += _written(kind, text[position:end]).split(" ")
        position = end
    return [
        " ".join(token for token in line if token and token not in REMOVED)
        for line in lines[: len(captions)]
    ]
