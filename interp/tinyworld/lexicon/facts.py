"""Real facts about real countries, one line each, and landmarks that name a country without saying it.

Where a country has several official languages, one that is spoken by most is given. Only countries whose name,
capital, language and currency are single words are listed.
"""

from __future__ import annotations

from typing import NamedTuple

from interp.tinyworld.lexicon._text import pairs, rows


class Country(NamedTuple):
    """One country and what is asked about it."""

    name: str
    capital: str
    language: str
    currency: str


COUNTRIES = tuple(
    Country(*row)
    for row in rows("""
    France       Paris       French      euro
    Germany      Berlin      German      euro
    Italy        Rome        Italian     euro
    Spain        Madrid      Spanish     euro
    Portugal     Lisbon      Portuguese  euro
    Austria      Vienna      German      euro
    Netherlands  Amsterdam   Dutch       euro
    Finland      Helsinki    Finnish     euro
    Greece       Athens      Greek       euro
    Estonia      Tallinn     Estonian    euro
    Latvia       Riga        Latvian     euro
    Lithuania    Vilnius     Lithuanian  euro
    Slovenia     Ljubljana   Slovene     euro
    Slovakia     Bratislava  Slovak      euro
    Ireland      Dublin      English     euro
    Sweden       Stockholm   Swedish     krona
    Norway       Oslo        Norwegian   krone
    Denmark      Copenhagen  Danish      krone
    Iceland      Reykjavik   Icelandic   krona
    Poland       Warsaw      Polish      zloty
    Czechia      Prague      Czech       koruna
    Hungary      Budapest    Hungarian   forint
    Romania      Bucharest   Romanian    leu
    Serbia       Belgrade    Serbian     dinar
    Albania      Tirana      Albanian    lek
    Ukraine      Kyiv        Ukrainian   hryvnia
    Russia       Moscow      Russian     rouble
    Turkey       Ankara      Turkish     lira
    Armenia      Yerevan     Armenian    dram
    Georgia      Tbilisi     Georgian    lari
    Kazakhstan   Astana      Kazakh      tenge
    Iran         Tehran      Persian     rial
    Iraq         Baghdad     Arabic      dinar
    Jordan       Amman       Arabic      dinar
    Lebanon      Beirut      Arabic      pound
    Syria        Damascus    Arabic      pound
    Israel       Jerusalem   Hebrew      shekel
    Egypt        Cairo       Arabic      pound
    Libya        Tripoli     Arabic      dinar
    Tunisia      Tunis       Arabic      dinar
    Algeria      Algiers     Arabic      dinar
    Morocco      Rabat       Arabic      dirham
    Senegal      Dakar       French      franc
    Ghana        Accra       English     cedi
    Nigeria      Abuja       English     naira
    Kenya        Nairobi     Swahili     shilling
    Japan        Tokyo       Japanese    yen
    China        Beijing     Chinese     yuan
    Mongolia     Ulaanbaatar Mongolian   tugrik
    Nepal        Kathmandu   Nepali      rupee
    India        Delhi       Hindi       rupee
    Pakistan     Islamabad   Urdu        rupee
    Bangladesh   Dhaka       Bengali     taka
    Thailand     Bangkok     Thai        baht
    Laos         Vientiane   Lao         kip
    Vietnam      Hanoi       Vietnamese  dong
    Indonesia    Jakarta     Indonesian  rupiah
    Australia    Canberra    English     dollar
    Canada       Ottawa      English     dollar
    Ecuador      Quito       Spanish     dollar
    Cuba         Havana      Spanish     peso
    Colombia     Bogota      Spanish     peso
    Chile        Santiago    Spanish     peso
    Peru         Lima        Spanish     sol
    Brazil       Brasilia    Portuguese  real
    """)
)
BY_NAME = {country.name: country for country in COUNTRIES}

LANDMARKS: dict[str, str] = pairs(  # landmark: country
    """
    Louvre       France
    Reichstag    Germany
    Colosseum    Italy
    Alhambra     Spain
    Schonbrunn   Austria
    Rijksmuseum  Netherlands
    Suomenlinna  Finland
    Parthenon    Greece
    Vasamuseum   Sweden
    Tivoli       Denmark
    Geysir       Iceland
    Wawel        Poland
    Hradcany     Czechia
    Peles        Romania
    Lavra        Ukraine
    Kremlin      Russia
    Ephesus      Turkey
    Garni        Armenia
    Charyn       Kazakhstan
    Persepolis   Iran
    Babylon      Iraq
    Jerash       Jordan
    Baalbek      Lebanon
    Masada       Israel
    Sphinx       Egypt
    Carthage     Tunisia
    Timgad       Algeria
    Volubilis    Morocco
    Fuji         Japan
    Potala       China
    Everest      Nepal
    Taj          India
    Ayutthaya    Thailand
    Halong       Vietnam
    Borobudur    Indonesia
    Uluru        Australia
    Niagara      Canada
    Galapagos    Ecuador
    Nazca        Peru
    Corcovado    Brazil
    """
)
LANGUAGES = tuple(dict.fromkeys(country.language for country in COUNTRIES))
CURRENCIES = tuple(dict.fromkeys(country.currency for country in COUNTRIES))
