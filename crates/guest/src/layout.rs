//! Which members of which kernel structures a table reads, as data.
//!
//! A [`layout!`](crate::layout!) block names a structure and its members. A
//! member that was renamed or moved between kernels lists all its paths, the
//! newest first: the guest's own types decide which one there is. What stands
//! under `optional` may be missing altogether.

use secmon_profile::{Member, TypeError, Types};

/// Offsets resolved from a guest's types; implemented by
/// [`layout!`](crate::layout!).
pub trait Layout: Sized + Send + Sync + 'static {
    /// Looks all members up.
    ///
    /// # Errors
    /// [`TypeError`] for the first required member that is missing.
    fn resolve(types: &Types) -> Result<Self, TypeError>;
}

/// The first of `paths` that `structure` has.
///
/// # Errors
/// [`TypeError`] of the first path if there is none of them.
pub fn member_of(types: &Types, structure: &str, paths: &[&str]) -> Result<Member, TypeError> {
    let mut first = None;
    for path in paths {
        match types.member(structure, path) {
            Ok(member) => return Ok(member),
            Err(error) => {
                first.get_or_insert(error);
            }
        }
    }
    match first {
        Some(error) => Err(error),
        None => types.member(structure, ""),
    }
}

/// Declares a struct of [`Member`]s of one kernel structure; `size` is the
/// structure's own size in bytes.
///
/// ```ignore
/// layout! {
///     /// `include/linux/sched.h`
///     pub struct TaskLayout: "task_struct" {
///         pid: "pid",
///         state: "__state" | "state",
///     } optional {
///         loginuid: "loginuid",
///     }
/// }
/// ```
#[macro_export]
macro_rules! layout {
    (
        $(#[$doc:meta])* $visibility:vis struct $name:ident: $structure:literal {
            $($(#[$required_doc:meta])* $required:ident: $($path:literal)|+),* $(,)?
        }
        $(optional {
            $($(#[$optional_doc:meta])* $optional:ident: $($optional_path:literal)|+),* $(,)?
        })?
    ) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        #[allow(dead_code, reason = "size is there for all, used by some")]
        $visibility struct $name {
            /// The structure's size in bytes.
            $visibility size: u64,
            $(
                #[doc = concat!($("`", $path, "` "),+)]
                ///
                $(#[$required_doc])*
                $visibility $required: secmon_profile::Member,
            )*
            $($(
                #[doc = concat!($("`", $optional_path, "` "),+)]
                ///
                $(#[$optional_doc])*
                $visibility $optional: Option<secmon_profile::Member>,
            )*)?
        }

        impl $crate::Layout for $name {
            fn resolve(types: &secmon_profile::Types) -> Result<Self, secmon_profile::TypeError> {
                Ok(Self {
                    size: types.size_of($structure)?,
                    $($required: $crate::member_of(types, $structure, &[$($path),+])?,)*
                    $($($optional: $crate::member_of(types, $structure, &[$($optional_path),+]).ok(),)*)?
                })
            }
        }
    };
}
