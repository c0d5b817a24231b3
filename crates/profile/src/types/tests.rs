use proptest::prelude::*;

use super::btf::MAGIC;
use super::encode::{Encoder, NewMember};
use super::*;

fn member(name: &str, type_id: u32, bit_offset: u32, bit_size: u8) -> NewMember {
    NewMember {
        name: name.to_owned(),
        type_id,
        bit_offset,
        bit_size,
    }
}

/// ```c
/// struct inner { int a; unsigned b:3, c:13; signed char d; };
/// struct outer {
///     struct list_head *next;
///     union { struct { struct inner in[3]; char name[16]; }; long word; };
///     unsigned long grid[2][5];
///     const char *text; enum state state; flex[];
/// };
/// ```
fn sample() -> Encoder {
    let mut encoder = Encoder::new();
    let int = encoder.integer("int", 4, true);
    let unsigned = encoder.integer("unsigned int", 4, false);
    let char = encoder.integer("char", 1, true);
    let long = encoder.integer("long unsigned int", 8, false);
    let inner = encoder.structure(
        Kind::Structure,
        "inner",
        12,
        &[
            member("a", int, 0, 0),
            member("b", unsigned, 32, 3),
            member("c", unsigned, 35, 13),
            member("d", char, 48, 0),
        ],
    );
    let forward = encoder.reference(Kind::Forward, "list_head", 0);
    let pointer = encoder.reference(Kind::Pointer, "", forward);
    let in_array = encoder.array(inner, 3);
    let name_array = encoder.array(char, 16);
    let anonymous = encoder.structure(
        Kind::Structure,
        "",
        56,
        &[
            member("in", in_array, 0, 0),
            member("name", name_array, 288, 0),
        ],
    );
    let either = encoder.structure(
        Kind::Union,
        "",
        56,
        &[member("", anonymous, 0, 0), member("word", long, 0, 0)],
    );
    let row = encoder.array(long, 5);
    let grid = encoder.array(row, 2);
    let constant = encoder.reference(Kind::Const, "", char);
    let text = encoder.reference(Kind::Pointer, "", constant);
    let values = [
        ("OFF".to_owned(), 0),
        ("ON".to_owned(), 5),
        ("BAD".to_owned(), -1),
    ];
    let state = encoder.enumeration("state", 4, &values);
    let flags = [("LOW".to_owned(), 1), ("HIGH".to_owned(), 1 << 40)];
    encoder.enumeration("", 8, &flags);
    let flexible = encoder.array(pointer, 0);
    let outer = encoder.structure(
        Kind::Structure,
        "outer",
        160,
        &[
            member("next", pointer, 0, 0),
            member("", either, 64, 0),
            member("grid", grid, 512, 0),
            member("text", text, 1152, 0),
            member("state", state, 1216, 0),
            member("flex", flexible, 1280, 0),
        ],
    );
    encoder.reference(Kind::Typedef, "outer_t", outer);
    encoder
}

#[test]
fn finds_members_through_anonymous_types_and_arrays() {
    let types = Types::parse(sample().finish()).expect("a good blob");
    let at = |path| types.member("outer", path).expect(path);
    assert_eq!(at("next").offset, 0);
    assert!(at("next").pointer);
    assert_eq!(at("next").type_name, "struct list_head *");
    assert_eq!(at("word").offset, 8);
    assert_eq!(at("in").offset, 8);
    assert_eq!(at("in").size, 36);
    assert_eq!(at("in").count, Some(3));
    assert_eq!(at("in[2].a").offset, 32);
    assert!(at("in[2].a").signed);
    assert_eq!(at("name").offset, 44);
    assert_eq!(at("name").type_name, "char[16]");
    assert_eq!(at("grid").type_name, "long unsigned int[2][5]");
    assert_eq!(at("grid[1][3]").offset, 64 + 5 * 8 + 3 * 8);
    assert_eq!(at("text").type_name, "const char *");
    assert_eq!(at("state").type_name, "enum state");
    assert!(at("state").signed);
    assert_eq!(at("flex").size, 0);
    assert_eq!(at("flex").count, Some(0));
    assert_eq!(at("flex[9]").offset, 160 + 72);
    assert_eq!(
        types.member("outer_t", "text"),
        types.member("struct outer", "text")
    );
    assert_eq!(types.size_of("outer_t"), Ok(160));
}

#[test]
fn places_bit_fields_in_their_storage_unit() {
    let types = Types::parse(sample().finish()).expect("a good blob");
    let field = types.member("inner", "c").expect("c");
    assert_eq!((field.offset, field.size), (4, 4));
    assert_eq!((field.bit_offset, field.bit_size), (3, 13));
    let plain = types.member("inner", "d").expect("d");
    assert_eq!((plain.offset, plain.size, plain.bit_size), (6, 1, 0));
    let inside = types.member("outer", "in[1].b").expect("b");
    assert_eq!(
        (inside.offset, inside.bit_offset, inside.bit_size),
        (24, 0, 3)
    );
}

#[test]
fn places_bit_fields_told_of_by_the_integer_alone() {
    let mut encoder = Encoder::new();
    let bits = encoder.bit_integer("unsigned int", 4, 0, 5);
    let members = [member("low", bits, 32, 0), member("high", bits, 37, 0)];
    encoder.structure(Kind::Structure, "old", 8, &members);
    let types = Types::parse(encoder.finish()).expect("a good blob");
    let high = types.member("old", "high").expect("high");
    assert_eq!(
        (high.offset, high.size, high.bit_offset, high.bit_size),
        (4, 4, 5, 5)
    );
}

#[test]
fn reads_enumerations() {
    let types = Types::parse(sample().finish()).expect("a good blob");
    assert_eq!(types.enumerator("state", "BAD"), Ok(-1));
    assert_eq!(types.any_enumerator("HIGH"), Some(1 << 40));
    assert_eq!(types.any_enumerator("MISSING"), None);
    assert!(matches!(
        types.enumerator("state", "MISSING"),
        Err(TypeError::NoEnumerator { .. })
    ));
    assert!(matches!(
        types.enumerators("outer"),
        Err(TypeError::UnknownType { .. })
    ));
}

#[test]
fn errors_name_what_was_not_found() {
    let types = Types::parse(sample().finish()).expect("a good blob");
    assert!(matches!(
        types.member("outer", "in[3].a"),
        Err(TypeError::IndexOutOfRange {
            index: 3,
            count: 3,
            ..
        })
    ));
    assert!(matches!(
        types.member("outer", "next.prev"),
        Err(TypeError::NotAContainer { .. })
    ));
    let error = types
        .member("outer", "in[0].zzz")
        .expect_err("no such member");
    assert_eq!(
        error.to_string(),
        r#"outer has no member "zzz" (asked for "in[0].zzz")"#
    );
    assert!(matches!(
        types.member("nothing", "x"),
        Err(TypeError::UnknownType { .. })
    ));
    assert!(!types.has("outer", ""));
}

#[test]
fn module_types_continue_the_kernels() {
    let base = sample();
    let mut module = Encoder::on_top_of(&base);
    let types = Types::parse(base.finish()).expect("a good blob");
    // Type 1 is the kernel's int; "list_head" and "a" are strings of its own.
    let members = [member("count", 1, 0, 0), member("other", 5, 32, 0)];
    module.structure(Kind::Structure, "mine", 16, &members);
    let types = types.parse_module(module.finish()).expect("a good blob");
    assert_eq!(types.member("mine", "other.d").expect("d").offset, 10);
    assert_eq!(types.member("outer", "word").expect("word").offset, 8);
    assert_eq!(types.iter().last().expect("a type").name, "mine");
    let member = types.members_of(types.iter().last().expect("a type").id);
    assert_eq!(member.expect("members")[0].name.as_deref(), Some("count"));
}

#[test]
fn lists_types_with_members() {
    let types = Types::parse(sample().finish()).expect("a good blob");
    let outer = types
        .iter()
        .find(|named| named.name == "outer")
        .expect("outer");
    assert_eq!((outer.kind, outer.size), (TypeKind::Structure, Some(160)));
    let members = types.members_of(outer.id).expect("members");
    let names: Vec<_> = members
        .iter()
        .map(|member| member.name.as_deref())
        .collect();
    let expected = [
        Some("next"),
        None,
        Some("grid"),
        Some("text"),
        Some("state"),
        Some("flex"),
    ];
    assert_eq!(names, expected);
    let forward = types.iter().find(|named| named.name == "list_head");
    assert_eq!(forward, None, "a forward declaration is no type");
}

#[test]
fn cycles_end_with_an_error() {
    let mut encoder = Encoder::new();
    let first = encoder.reference(Kind::Typedef, "a", 2);
    encoder.reference(Kind::Typedef, "b", first);
    let array = encoder.array(3, 2);
    encoder.reference(Kind::Typedef, "endless", array);
    // An anonymous structure that contains itself.
    encoder.structure(
        Kind::Structure,
        "",
        8,
        &[member("", 5, 0, 0), member("", 5, 0, 0)],
    );
    encoder.structure(Kind::Structure, "nested", 8, &[member("", 5, 0, 0)]);
    let types = Types::parse(encoder.finish()).expect("records are well formed");
    assert!(matches!(types.size_of("a"), Err(TypeError::Damaged { .. })));
    assert!(matches!(
        types.size_of("endless"),
        Err(TypeError::Damaged { .. })
    ));
    assert!(matches!(
        types.member("nested", "x"),
        Err(TypeError::Damaged { .. })
    ));
}

#[test]
fn refuses_headers_that_promise_too_much() {
    let good = sample().finish();
    assert!(matches!(
        Types::parse(good[..20].to_vec()),
        Err(BtfError::TooShort { .. })
    ));
    for (word, section) in [(4, "header"), (12, "type"), (20, "string")] {
        let mut bad = good.clone();
        bad[word + 3] = 0x7f;
        match Types::parse(bad) {
            Err(BtfError::Section { section: found, .. }) => assert_eq!(found, section),
            other => panic!("{section}: {other:?}"),
        }
    }
    let mut cut = good.clone();
    cut.truncate(good.len() - 1);
    assert!(Types::parse(cut).is_err());
}

#[test]
fn skips_later_kinds_that_the_layout_section_describes() {
    let mut encoder = Encoder::new();
    encoder.integer("int", 4, true);
    let mut good = encoder.finish();
    // A record of kind 30 with two elements of 4 bytes and 8 fixed ones.
    let types = [0_u32, 30 << 24 | 2, 7, 1, 2, 3, 4]
        .map(u32::to_le_bytes)
        .concat();
    let types = [&good[24..40], &types, &good[24..40]].concat();
    let strings = good.split_off(40);
    let layout = [[0_u8; 4]; 30].concat();
    let layout = [&layout[..], &[8, 4, 0, 0]].concat();
    let word = |value: usize| (value as u32).to_le_bytes();
    let mut bytes = [MAGIC.to_le_bytes(), [1, 0]].concat();
    for value in [
        32,
        0,
        types.len(),
        types.len(),
        strings.len(),
        types.len() + strings.len(),
        layout.len(),
    ] {
        bytes.extend(word(value));
    }
    bytes.extend([types, strings, layout].concat());
    let parsed = Types::parse(bytes).expect("the layout describes kind 30");
    assert_eq!(parsed.len(), 3);
    assert_eq!(parsed.size_of("int"), Ok(4));
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(
        bytes in proptest::collection::vec(any::<u8>(), 0..512),
        with_header in any::<bool>(),
    ) {
        let mut bytes = bytes;
        if with_header && bytes.len() > 24 {
            let rest = bytes.len() as u32 - 24;
            let types = rest / 2;
            bytes[..4].copy_from_slice(&[0x9f, 0xeb, 1, 0]);
            for (index, word) in [24, 0, types, types, rest - types].iter().enumerate() {
                bytes[4 + index * 4..8 + index * 4].copy_from_slice(&u32::to_le_bytes(*word));
            }
            bytes[24 + types as usize] = 0;
            *bytes.last_mut().expect("more than 24 bytes") = 0;
        }
        exercise(bytes);
    }

    #[test]
    fn flipped_bits_of_a_good_blob_never_panic(
        flips in proptest::collection::vec((0_usize..4096, 0_u8..8), 1..8),
    ) {
        let mut bytes = sample().finish();
        for (position, bit) in flips {
            let position = position % bytes.len();
            bytes[position] ^= 1 << bit;
        }
        exercise(bytes);
    }
}

/// Asks everything there is to ask.
fn exercise(bytes: Vec<u8>) {
    let Ok(types) = Types::parse(bytes) else {
        return;
    };
    for named in types.iter() {
        let _ = types.size_of(&named.name);
        let _ = types.member(&named.name, "in[1].a");
        let _ = types.members_of(named.id);
        let _ = types.enumerators_of(named.id);
    }
    for (structure, path) in [("outer", "in[2].c"), ("outer", "flex[1]"), ("inner", "d")] {
        let _ = types.member(structure, path);
    }
    let _ = types.any_enumerator("HIGH");
}
