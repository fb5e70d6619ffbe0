"""What messages are made of."""

from localprop.errors import counted, listing, shortened, shown


def test_a_text_is_cut_to_one_line():
    assert shortened("a\nb") == "a\\nb"
    assert shortened("x" * 60) == "x" * 60
    assert shortened("x" * 61) == "x" * 57 + "..."
    assert shortened("x" * 10**6, 10) == "xxxxxxx..."


def test_a_value_is_as_python_writes_it_but_short():
    for value in ("word", 0.5, None, -(10**23), [1, "two"]):
        assert shown(value) == repr(value)
    assert shown("x" * 100) == "'" + "x" * 56 + "..."
    assert shown("a\nb") == r"'a\nb'"
    for digits in (24, 5000):  # Python writes no number of thousands of digits
        assert shown(10**digits) == "a number of more than 24 digits"
    assert shown([10**5000]) == "a list with a number of thousands of digits"


def test_a_list_of_names_ends_after_five():
    assert listing("abcdefg") == "a, b, c, d, e and 2 more"


def test_a_number_has_its_noun():
    assert [counted(count, "image") for count in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert counted(2, "process", "processes") == "2 processes"
