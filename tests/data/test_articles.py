"""Articles of captions: by the sound, not the letter."""

import pytest

from glide_jax.data.articles import with_article

AN = """apple;hourglass;hour;honest face;heir;umbrella;up arrow;unidentified object;unimportant man;
uninvited guest;usher;urn;urban street;egg;eight o'clock;8-ball;80s car;11th hour;18;1800s dress;
11,000 bees;X-ray;F-16;NFL team;SOS button;LED lamp;MP3 player;OK hand;ID card;e-mail;O button;
old "cat";éclair;île;Übung;“apple”;(old) car;onerous task;orca;Apple;utter fool;Ewok;HMS ship"""
A = """rocket;unicorn;uniform;unit;union;unique hat;university;useful tool;used car;user;usual day;
utensil;utopia;ukulele;European;eucalyptus;ewe;one-piece swimsuit;one-way street;one;once-red car;
U-turn;UFO;USB stick;US flag;house;hotel;T-Rex;B button;PNG file;ZZZ;110 bees;100;3D cube;7;
180 bees;猫;ubiquitous sign;urinal;Uranus;red apple;yo-yo;FREE button;Mx Claus"""


def words(text):
    return [word.strip() for word in text.split(";")]


@pytest.mark.parametrize("caption", words(AN))
def test_vowel_sounds_take_an(caption):
    assert with_article(caption) == f"an {caption}"


@pytest.mark.parametrize("caption", words(A))
def test_consonant_sounds_take_a(caption):
    assert with_article(caption) == f"a {caption}"


@pytest.mark.parametrize(
    "caption", ["", "a cat", "An apple", "the sun", "some bees", "my unicorn", "these shoes"]
)
def test_a_caption_with_an_article_or_without_words_is_not_changed(caption):
    assert with_article(caption) == caption


def test_white_space_around_a_caption_is_left_out():
    assert with_article(" \n") == "" and with_article(" hour\t") == "an hour"
