//! Parameters of modules (`struct kernel_param`, `include/linux/moduleparam.h`)
//! and their values, for the types that the kernel itself defines: a
//! parameter's type is told by which of the kernel's `param_get_…` functions
//! shows it.

use secmon_memory::{ReadError, VirtualAddress};

use crate::{Guest, TableError, layout};

/// More parameters than this has no module.
const MOST_PARAMETERS: u64 = 4096;
/// Bytes of a value or name at most; the kernel's own limit is a page.
const LONGEST_TEXT: usize = 4096;
/// More elements than this has no array parameter.
const MOST_ELEMENTS: u64 = 1024;

layout! {
    /// `include/linux/moduleparam.h`
    struct ParameterLayout: "kernel_param" {
        name: "name",
        operations: "ops",
        permissions: "perm",
        argument: "arg",
    }
}

layout! {
    /// `include/linux/moduleparam.h`
    struct OperationsLayout: "kernel_param_ops" {
        get: "get",
    }
}

layout! {
    /// `include/linux/moduleparam.h`: a text in a buffer of fixed size.
    struct StringLayout: "kparam_string" {
        length: "maxlen",
        string: "string",
    }
}

layout! {
    /// `include/linux/moduleparam.h`: several values of one type.
    struct ArrayLayout: "kparam_array" {
        maximum: "max",
        element_size: "elemsize",
        count: "num",
        operations: "ops",
        elements: "elem",
    }
}

/// A parameter of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name.
    pub name: Vec<u8>,
    /// Its value as `/sys/module/NAME/parameters` shows it; none if only the
    /// module's own code knows how to write it.
    pub value: Option<Vec<u8>>,
    /// The permissions of its file in `/sys`; 0 if it has none.
    pub permissions: u16,
}

/// The types of parameters that the kernel itself defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ParameterType {
    /// An integer of that many bytes.
    Unsigned(usize),
    /// An integer of that many bytes, with a sign.
    Signed(usize),
    /// A 4-byte integer shown in hexadecimal.
    Hexadecimal,
    /// `Y` or `N`.
    Boolean,
    /// `Y` for false.
    InvertedBoolean,
    /// A pointer to text.
    TextPointer,
    /// Text in a buffer.
    Buffer,
    /// Several values.
    Array,
}

/// Which function of the kernel writes which type: modules have operations of
/// their own that set a value and still use these to show it.
const TYPES: [(&str, ParameterType); 14] = [
    ("param_get_byte", ParameterType::Unsigned(1)),
    ("param_get_short", ParameterType::Signed(2)),
    ("param_get_ushort", ParameterType::Unsigned(2)),
    ("param_get_int", ParameterType::Signed(4)),
    ("param_get_uint", ParameterType::Unsigned(4)),
    ("param_get_long", ParameterType::Signed(8)),
    ("param_get_ulong", ParameterType::Unsigned(8)),
    ("param_get_ullong", ParameterType::Unsigned(8)),
    ("param_get_hexint", ParameterType::Hexadecimal),
    ("param_get_bool", ParameterType::Boolean),
    ("param_get_invbool", ParameterType::InvertedBoolean),
    ("param_get_charp", ParameterType::TextPointer),
    ("param_get_string", ParameterType::Buffer),
    ("param_array_get", ParameterType::Array),
];

/// The addresses of those functions in one guest.
#[derive(Debug)]
pub struct ParameterTypes(Vec<(VirtualAddress, ParameterType)>);

impl ParameterTypes {
    /// Looks them up.
    pub fn of(guest: &Guest) -> Self {
        let known = TYPES.iter().filter_map(|(symbol, kind)| {
            guest
                .symbols()
                .address(symbol)
                .map(|address| (address, *kind))
        });
        Self(known.collect())
    }

    fn find(
        &self,
        guest: &Guest,
        table: &'static str,
        operations: VirtualAddress,
    ) -> Result<Option<ParameterType>, ReadError> {
        let Ok(layout) = guest.layout::<OperationsLayout>(table) else {
            return Ok(None);
        };
        let get = guest.pointer(operations, &layout.get)?;
        Ok(self
            .0
            .iter()
            .find(|(address, _)| *address == get)
            .map(|(_, kind)| *kind))
    }
}

/// The parameters of the array at `address`.
///
/// # Errors
/// [`TableError`] if the types lack a member, [`ReadError`] inside if the
/// array can't be read.
pub fn parameters(
    guest: &Guest,
    table: &'static str,
    types: &ParameterTypes,
    address: VirtualAddress,
    count: u64,
) -> Result<Result<Vec<Parameter>, ReadError>, TableError> {
    if count == 0 || address.is_null() {
        return Ok(Ok(Vec::new()));
    }
    let layout = guest.layout::<ParameterLayout>(table)?;
    let one = |index: u64| -> Result<Parameter, ReadError> {
        let parameter = address.wrapping_add(index.wrapping_mul(layout.size));
        let name = guest.pointer(parameter, &layout.name)?;
        let operations = guest.pointer(parameter, &layout.operations)?;
        let argument = guest.pointer(parameter, &layout.argument)?;
        Ok(Parameter {
            name: guest.space().read_c_string(name, LONGEST_TEXT)?,
            value: match types.find(guest, table, operations)? {
                Some(kind) => value(guest, table, types, kind, argument)?,
                None => None,
            },
            permissions: guest.number(parameter, &layout.permissions)? as u16,
        })
    };
    Ok((0..count.min(MOST_PARAMETERS)).map(one).collect())
}

/// The value at `argument` as the kernel writes it.
fn value(
    guest: &Guest,
    table: &'static str,
    types: &ParameterTypes,
    kind: ParameterType,
    argument: VirtualAddress,
) -> Result<Option<Vec<u8>>, ReadError> {
    match kind {
        ParameterType::Buffer => {
            let Ok(layout) = guest.layout::<StringLayout>(table) else {
                return Ok(None);
            };
            let length = guest.number(argument, &layout.length)? as usize;
            let string = guest.pointer(argument, &layout.string)?;
            let text = guest
                .space()
                .read_c_string(string, length.min(LONGEST_TEXT))?;
            Ok(Some(text))
        }
        ParameterType::Array => {
            let Ok(layout) = guest.layout::<ArrayLayout>(table) else {
                return Ok(None);
            };
            let operations = guest.pointer(argument, &layout.operations)?;
            // The elements of an array are no arrays: nothing recurses.
            let kind = match types.find(guest, table, operations)? {
                Some(kind) if kind != ParameterType::Array && kind != ParameterType::Buffer => kind,
                _ => return Ok(None),
            };
            let maximum = guest.number(argument, &layout.maximum)?;
            let count = guest.pointer(argument, &layout.count)?;
            let count = match count.is_null() {
                true => maximum,
                false => u64::from(guest.space().read_u32(count)?),
            };
            let size = guest.number(argument, &layout.element_size)?;
            let elements = guest.pointer(argument, &layout.elements)?;
            let mut all = Vec::new();
            for index in 0..count.min(maximum).min(MOST_ELEMENTS) {
                if index > 0 {
                    all.push(b',');
                }
                let element = elements.wrapping_add(index.wrapping_mul(size));
                all.extend(simple(guest, kind, element)?);
            }
            Ok(Some(all))
        }
        _ => simple(guest, kind, argument).map(Some),
    }
}

/// A value that stands by itself.
fn simple(
    guest: &Guest,
    kind: ParameterType,
    argument: VirtualAddress,
) -> Result<Vec<u8>, ReadError> {
    let number = |size: usize| -> Result<u64, ReadError> {
        let mut bytes = [0; 8];
        guest
            .space()
            .read(argument, bytes.get_mut(..size).unwrap_or_default())?;
        Ok(u64::from_le_bytes(bytes))
    };
    let flag = |inverted: bool| -> Result<Vec<u8>, ReadError> {
        let set = number(1)? != 0;
        Ok(if set == inverted { b"N" } else { b"Y" }.to_vec())
    };
    Ok(match kind {
        ParameterType::Unsigned(size) => number(size)?.to_string().into_bytes(),
        ParameterType::Signed(size) => {
            let unused = 64 - 8 * size as u32;
            let value = (number(size)? << unused) as i64 >> unused;
            value.to_string().into_bytes()
        }
        ParameterType::Hexadecimal => match number(4)? {
            // What the kernel's "%#08x" makes of it.
            0 => b"00000000".to_vec(),
            value => format!("{value:#08x}").into_bytes(),
        },
        ParameterType::Boolean => flag(false)?,
        ParameterType::InvertedBoolean => flag(true)?,
        ParameterType::TextPointer => {
            let text = VirtualAddress::new(number(8)?);
            match text.is_null() {
                // What the kernel's formatting makes of a null pointer.
                true => b"(null)".to_vec(),
                false => guest.space().read_c_string(text, LONGEST_TEXT)?,
            }
        }
        ParameterType::Buffer | ParameterType::Array => Vec::new(),
    })
}
