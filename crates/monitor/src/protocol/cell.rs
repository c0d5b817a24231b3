//! A table's value on the wire.

use serde::{Deserialize, Serialize};

use secmon_guest::Value;

/// What stands in one cell: a [`Value`] whose lists hold no lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cell {
    /// One value.
    One(Scalar),
    /// Several.
    List(Vec<Scalar>),
}

/// One value; each stands for the variant of [`Value`] with its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scalar {
    /// The guest has no such thing.
    Null,
    /// Yes or no.
    Boolean(bool),
    /// A number from 0 on.
    Unsigned(u64),
    /// A number that can be negative.
    Signed(i64),
    /// An address.
    Address(u64),
    /// Bytes that the guest means as text.
    Text(Vec<u8>),
    /// Nanoseconds since 1970-01-01T00:00:00Z.
    Time(i128),
    /// It is there but could not be read; the reason.
    Unreadable(String),
}

impl From<&Value> for Scalar {
    /// A list becomes its text: no table has a list of lists.
    fn from(value: &Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Boolean(value) => Self::Boolean(*value),
            Value::Unsigned(value) => Self::Unsigned(*value),
            Value::Signed(value) => Self::Signed(*value),
            Value::Address(value) => Self::Address(*value),
            Value::Text(text) => Self::Text(text.as_bytes().to_vec()),
            Value::Time(value) => Self::Time(value.nanoseconds()),
            Value::Unreadable(reason) => Self::Unreadable(reason.to_string()),
            Value::List(_) => Self::Text(value.to_string().into_bytes()),
        }
    }
}

impl From<&Value> for Cell {
    fn from(value: &Value) -> Self {
        match value {
            Value::List(values) => Self::List(values.iter().map(Scalar::from).collect()),
            other => Self::One(other.into()),
        }
    }
}

impl From<Scalar> for Value {
    fn from(scalar: Scalar) -> Self {
        match scalar {
            Scalar::Null => Self::Null,
            Scalar::Boolean(value) => Self::Boolean(value),
            Scalar::Unsigned(value) => Self::Unsigned(value),
            Scalar::Signed(value) => Self::Signed(value),
            Scalar::Address(value) => Self::Address(value),
            Scalar::Text(bytes) => Self::text(bytes),
            Scalar::Time(value) => Self::time(value),
            Scalar::Unreadable(reason) => Self::Unreadable(reason.into()),
        }
    }
}

impl From<Cell> for Value {
    fn from(cell: Cell) -> Self {
        match cell {
            Cell::One(scalar) => scalar.into(),
            Cell::List(scalars) => Self::List(scalars.into_iter().map(Into::into).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value() -> impl Strategy<Value = Value> {
        let scalar = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::Boolean),
            any::<u64>().prop_map(Value::Unsigned),
            any::<i64>().prop_map(Value::Signed),
            any::<u64>().prop_map(Value::Address),
            proptest::collection::vec(any::<u8>(), 0..20).prop_map(Value::text),
            any::<i128>().prop_map(Value::time),
            "\\PC{0,10}".prop_map(Value::unreadable),
        ];
        prop_oneof![
            scalar.clone(),
            proptest::collection::vec(scalar, 0..5).prop_map(Value::from),
        ]
    }

    proptest! {
        #[test]
        fn values_cross_the_wire_unchanged(values in proptest::collection::vec(value(), 0..8)) {
            let cells: Vec<Cell> = values.iter().map(Cell::from).collect();
            let bytes = secmon_channel::encode(&cells, 1 << 20).expect("bytes");
            let cells: Vec<Cell> = secmon_channel::decode(&bytes).expect("cells");
            let back: Vec<Value> = cells.into_iter().map(Value::from).collect();
            prop_assert_eq!(back, values);
        }
    }
}
