//! Paths over a small memory with structures of our own layout.

use proptest::prelude::*;
use secmon_profile::Member;

use super::walk::Names;
use super::*;
use crate::Diagnostics;
use crate::synthetic::{SIZE, Synthetic};

fn member(offset: u64, size: u64) -> Member {
    Member {
        offset,
        size,
        bit_offset: 0,
        bit_size: 0,
        signed: false,
        count: None,
        type_name: String::new(),
        pointer: size == 8,
    }
}

const PARENT: u64 = 0;
const HASH_PPREV: u64 = 8;
const NAME_LENGTH: u64 = 16;
const NAME: u64 = 24;
const INODE: u64 = 32;
const OPERATIONS: u64 = 40;
const SUPERBLOCK: u64 = 48;
const INLINE_NAME: u64 = 56;

/// `mount`; its `vfsmount` starts with the root.
const MOUNT_PARENT: u64 = 0;
const MOUNTPOINT: u64 = 8;
const VFSMOUNT: u64 = 16;
const MOUNT_SUPERBLOCK: u64 = 24;
const FLAGS: u64 = 32;
const NAMESPACE: u64 = 40;

/// Where things lie.
const SYSTEM: u64 = 0x100;
const SYSTEM_TYPE: u64 = 0x140;
const SYSTEM_NAME: u64 = 0x180;
const THE_NAMESPACE: u64 = 0x200;
const THE_OPERATIONS: u64 = 0x240;
const THE_INODE: u64 = 0x280;

fn dentry(number: u64) -> u64 {
    0x1000 + number * 128
}

fn mount(number: u64) -> u64 {
    0x8000 + number * 64
}

fn paths(root: Option<PathPointer>, live: bool) -> Paths {
    let dentry = DentryLayout {
        size: 128,
        parent: member(PARENT, 8),
        hash_pprev: member(HASH_PPREV, 8),
        name_length: member(NAME_LENGTH, 4),
        name: member(NAME, 8),
        inode: member(INODE, 8),
        operations: member(OPERATIONS, 8),
        superblock: member(SUPERBLOCK, 8),
    };
    let mount = MountLayout {
        size: 64,
        vfsmount: member(VFSMOUNT, 32),
        root: member(VFSMOUNT, 8),
        superblock: member(MOUNT_SUPERBLOCK, 8),
        parent: member(MOUNT_PARENT, 8),
        mountpoint: member(MOUNTPOINT, 8),
        namespace: member(NAMESPACE, 8),
    };
    let pointer = || member(0, 8);
    let (size, kind, name, operations) = (64, pointer(), pointer(), pointer());
    Paths {
        dentry_span: Span::of([&member(0, 8), &member(SUPERBLOCK, 8)]),
        mount_span: Span::of([&member(0, 8), &member(NAMESPACE, 8)]),
        dentry: Arc::new(dentry),
        mount: Arc::new(mount),
        mount_namespace: Arc::new(MountNamespaceLayout {
            size,
            root: pointer(),
            is_anonymous: Some(member(8, 1)),
            sequence: None,
        }),
        operations: Arc::new(DentryOperationsLayout {
            size,
            dname: pointer(),
        }),
        superblock: Arc::new(NameSuperblockLayout { size, kind }),
        file_system: Arc::new(FileSystemTypeLayout {
            size,
            name: name.clone(),
        }),
        inode: Arc::new(NameInodeLayout {
            size,
            number: pointer(),
            private: member(8, 8),
        }),
        namespace: Arc::new(NamespaceNameLayout { size, operations }),
        namespace_operations: Arc::new(NamespaceOperationsLayout { size, name }),
        root,
        locks: [None; 2],
        live,
        patience: Patience::default(),
        memory: Mutex::default(),
    }
}

fn write_name(memory: &Synthetic, number: u64, name: &[u8]) {
    let here = dentry(number);
    memory.write(here + NAME_LENGTH, &(name.len() as u32).to_le_bytes());
    memory.write_pointer(here + NAME, here + INLINE_NAME);
    memory.write(here + INLINE_NAME, name);
}

fn write_dentry(memory: &Synthetic, number: u64, parent: u64, name: &str) {
    let here = dentry(number);
    memory.write_pointer(here + PARENT, dentry(parent));
    memory.write_pointer(here + HASH_PPREV, 0x3f_0000);
    memory.write_pointer(here + SUPERBLOCK, SYSTEM);
    memory.write_pointer(here + INODE, THE_INODE);
    write_name(memory, number, name.as_bytes());
}

fn write_mount(memory: &Synthetic, number: u64, root: u64, parent: u64, mountpoint: u64) {
    let here = mount(number);
    memory.write_pointer(here + VFSMOUNT, dentry(root));
    memory.write_pointer(here + MOUNT_PARENT, mount(parent));
    memory.write_pointer(here + MOUNTPOINT, dentry(mountpoint));
    memory.write_pointer(here + MOUNT_SUPERBLOCK, SYSTEM);
    memory.write_u64(here + FLAGS, 0);
    memory.write_pointer(here + NAMESPACE, THE_NAMESPACE);
}

fn at(mount_number: u64, dentry_number: u64) -> PathPointer {
    PathPointer {
        mount: Synthetic::at(mount(mount_number) + VFSMOUNT),
        dentry: Synthetic::at(dentry(dentry_number)),
    }
}

/// `/` (0), `/mnt` (1); mounted there: its root (2) with `a` (3) and `a/b b`
/// (4).
fn tree(volatility: Volatility) -> Synthetic {
    let memory = Synthetic::new(volatility);
    memory.write_pointer(SYSTEM, SYSTEM_TYPE);
    memory.write_pointer(SYSTEM_TYPE, SYSTEM_NAME);
    memory.write(SYSTEM_NAME, b"pipefs\0");
    memory.write_u64(THE_INODE, 77);
    write_dentry(&memory, 0, 0, "/");
    write_dentry(&memory, 1, 0, "mnt");
    write_dentry(&memory, 2, 2, "/");
    write_dentry(&memory, 3, 2, "a");
    write_dentry(&memory, 4, 3, "b b");
    write_mount(&memory, 0, 0, 0, 0);
    write_mount(&memory, 1, 2, 0, 1);
    memory
}

fn resolve(paths: &Paths, memory: &Synthetic, pointer: PathPointer) -> Result<Path, PathError> {
    let diagnostics = Diagnostics::default();
    let space = memory.space();
    let view = View {
        space: &space,
        diagnostics: &diagnostics,
    };
    paths.resolve_in(view, pointer).map(|path| (*path).clone())
}

fn path(text: &str, reach: Reach) -> Result<Path, PathError> {
    Ok(Path {
        text: text.into(),
        deleted: false,
        reach,
    })
}

#[test]
fn goes_up_across_mounts() {
    for live in [false, true] {
        let memory = tree(Volatility::Live);
        let paths = paths(None, live);
        // Twice: the second time from what was remembered.
        for _ in 0..2 {
            let expected = path("/mnt/a/b b", Reach::Namespace);
            assert_eq!(resolve(&paths, &memory, at(1, 4)), expected);
            let expected = path("/mnt/a", Reach::Namespace);
            assert_eq!(resolve(&paths, &memory, at(1, 3)), expected);
            let expected = path("/mnt", Reach::Namespace);
            assert_eq!(resolve(&paths, &memory, at(1, 2)), expected);
            let expected = path("/", Reach::Namespace);
            assert_eq!(resolve(&paths, &memory, at(0, 0)), expected);
        }
    }
}

#[test]
fn stops_at_the_root_given() {
    let memory = tree(Volatility::Static);
    let paths = paths(Some(at(1, 3)), false);
    assert_eq!(
        resolve(&paths, &memory, at(1, 4)),
        path("/b b", Reach::Root)
    );
    assert_eq!(resolve(&paths, &memory, at(1, 3)), path("/", Reach::Root));
    let outside = path("/mnt", Reach::Namespace);
    assert_eq!(resolve(&paths, &memory, at(1, 2)), outside);
}

#[test]
fn tells_what_is_deleted_detached_and_escaped() {
    let memory = tree(Volatility::Static);
    memory.write_u64(dentry(4) + HASH_PPREV, 0);
    let found = resolve(&paths(None, false), &memory, at(1, 4)).expect("a path");
    assert!(found.deleted);
    assert_eq!(found.text, "/mnt/a/b b".into());

    // Unmounted lazily: its own parent, in no namespace.
    memory.write_pointer(mount(1) + MOUNT_PARENT, mount(1));
    memory.write_u64(mount(1) + NAMESPACE, 0);
    let expected = path("/a", Reach::Detached);
    assert_eq!(resolve(&paths(None, false), &memory, at(1, 3)), expected);
    // In a namespace of its own that no process has.
    memory.write_pointer(mount(1) + NAMESPACE, THE_NAMESPACE);
    memory.write(THE_NAMESPACE + 8, &[1]);
    assert_eq!(resolve(&paths(None, false), &memory, at(1, 3)), expected);

    // A mount of `a` alone does not lead from what was moved out of it.
    memory.write_pointer(mount(1) + VFSMOUNT, dentry(4));
    let expected = path("/a", Reach::Escaped);
    assert_eq!(resolve(&paths(None, false), &memory, at(1, 3)), expected);
}

#[test]
fn makes_names_up() {
    let memory = tree(Volatility::Static);
    memory.write_pointer(THE_OPERATIONS, 0x20_0000);
    memory.write_pointer(dentry(4) + OPERATIONS, THE_OPERATIONS);
    let expected = path("pipe:[77]", Reach::Pseudo);
    assert_eq!(resolve(&paths(None, false), &memory, at(1, 4)), expected);
    memory.write(SYSTEM_NAME, b"anon_inodefs\0");
    let expected = path("anon_inode:b b", Reach::Pseudo);
    assert_eq!(resolve(&paths(None, false), &memory, at(1, 4)), expected);
    memory.write(SYSTEM_NAME, b"tmpfs\0");
    let found = resolve(&paths(None, false), &memory, at(1, 4)).expect("a name");
    assert_eq!((found.text, found.deleted), ("/b b".into(), true));
}

#[test]
fn refuses_what_leads_nowhere() {
    let memory = tree(Volatility::Static);
    let fails = |memory: &Synthetic| resolve(&paths(None, false), memory, at(1, 4));
    memory.write_u64(dentry(3) + PARENT, 0x7fff_0000_1000);
    assert!(matches!(fails(&memory), Err(PathError::Pointer { .. })));
    memory.write_u64(dentry(3) + PARENT, 0xffff_ffff_8000_0000);
    assert!(matches!(fails(&memory), Err(PathError::Read { .. })));
    memory.write_pointer(dentry(3) + PARENT, dentry(4));
    assert!(matches!(
        fails(&memory),
        Err(PathError::Endless { steps, .. }) if steps < 20
    ));
    memory.write_pointer(dentry(3) + PARENT, dentry(2));
    for name in [&b"a/b"[..], b"a\0b", b""] {
        write_name(&memory, 3, name);
        assert!(matches!(fails(&memory), Err(PathError::Name { .. })));
    }
    memory.write(dentry(3) + NAME_LENGTH, &u32::MAX.to_le_bytes());
    assert!(matches!(fails(&memory), Err(PathError::Name { .. })));
}

#[test]
fn a_rename_during_the_read_gives_the_old_or_the_new_path() {
    for moment in 1..60 {
        let memory = tree(Volatility::Live);
        let paths = paths(None, true);
        let mut reads = 0;
        memory.on_read(move |bytes, _| {
            reads += 1;
            if reads == moment {
                // "a" becomes "other", in one moment.
                let here = dentry(3) as usize;
                let length = here + NAME_LENGTH as usize;
                bytes[length..length + 4].copy_from_slice(&5_u32.to_le_bytes());
                let text = here + INLINE_NAME as usize;
                bytes[text..text + 5].copy_from_slice(b"other");
            }
        });
        let found = resolve(&paths, &memory, at(1, 4)).expect("a path");
        assert!(
            [&b"/mnt/a/b b"[..], b"/mnt/other/b b"].contains(&found.text.as_bytes()),
            "{:?}",
            found.text
        );
    }
}

#[test]
fn joins_names_from_their_end() {
    let mut names = Names::default();
    assert_eq!(names.join(b""), b"");
    assert_eq!(names.join(b"/base"), b"/base");
    names.push(b"file");
    assert_eq!(names.join(b""), b"/file");
    names.push(b"b");
    names.push(b"a");
    assert_eq!(names.join(b"/mnt"), b"/mnt/a/b/file");
    assert_eq!(names.first, "/file".len());
}

#[test]
fn tells_pointers_from_error_numbers() {
    let address = VirtualAddress::new;
    assert!(is_error(address(-22_i64 as u64)));
    assert!(!is_kernel_pointer(address(-22_i64 as u64)));
    assert!(!is_kernel_pointer(address(0)));
    assert!(!is_kernel_pointer(address(0x7fff_ffff_f000)));
    assert!(is_kernel_pointer(address(0xffff_8880_0000_1000)));
}

proptest! {
    /// Whatever dentries and mounts hold: an end, bounded, no panic.
    #[test]
    fn any_damage_ends(
        damage in prop::collection::vec(
            (any::<bool>(), 0..640_u64, any::<u64>(), 0..4_u8), 1..32),
        live in any::<bool>(),
    ) {
        let memory = tree(Volatility::Static);
        for (in_mounts, place, value, kind) in damage {
            let value = match kind {
                0 => value,
                1 => value & 0xff,
                2 => Synthetic::at(dentry(value % 6)).as_u64(),
                _ => Synthetic::at(value % SIZE).as_u64(),
            };
            let base = if in_mounts { mount(0) } else { dentry(0) };
            memory.write_u64(base + place / 8 * 8, value);
        }
        let paths = paths(None, live);
        for number in 0..5 {
            if let Ok(found) = resolve(&paths, &memory, at(1, number)) {
                prop_assert!(found.text.as_bytes().len() <= 1 << 16);
            }
        }
    }
}
