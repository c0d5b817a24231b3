//! What a table is: named, typed, documented columns, and rows made as they
//! are asked for.
//!
//! A table is one `static` [`TableOf`]: a function that walks the guest and
//! hands out items, and for each column a function from an item to a
//! [`Value`]. Only the functions of the columns that were asked for run, so
//! a caller that wants one column pays for one.

use std::ops::ControlFlow;

use secmon_profile::{ProfileError, TypeError};

use crate::split::Split;
use crate::{Guest, Value};

/// The type of a column's values (each may also be null or unreadable).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Boolean,
    /// A number from 0 on.
    Unsigned,
    /// A number that can be negative.
    Signed,
    /// An address.
    Address,
    /// Text.
    Text,
    /// A moment, UTC.
    Time,
    /// A list of texts or numbers.
    List,
}

/// What a column's values cost to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    /// Reads of kernel memory only.
    Kernel,
    /// Pages of a process's user memory as well.
    UserPages,
}

/// When a terminal shows the column (other formats always have all).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// Unless other columns were asked for.
    Always,
    /// Only if it was asked for by name, or all were.
    OnRequest,
}

/// A column and how its value is made from an item `R`.
pub struct Column<R: 'static> {
    /// Name in `snake_case`, stable.
    pub name: &'static str,
    /// The type of its values.
    pub kind: Kind,
    /// What it costs.
    pub cost: Cost,
    /// When a terminal shows it.
    pub shown: Shown,
    /// What it means, with units; one or two sentences.
    pub meaning: &'static str,
    /// Makes the value.
    pub value: fn(&Guest, &R) -> Value,
}

/// What is known of a column without reading a guest.
#[derive(Clone, Copy, Debug)]
pub struct ColumnInfo {
    /// Name in `snake_case`, stable.
    pub name: &'static str,
    /// The type of its values.
    pub kind: Kind,
    /// What it costs.
    pub cost: Cost,
    /// When a terminal shows it.
    pub shown: Shown,
    /// What it means.
    pub meaning: &'static str,
}

/// Which rows are wanted.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Whether columns that need pages of user memory are asked for, so that a
    /// table may look at these pages ahead. It changes no row, and is set where
    /// a table is read.
    pub user_pages: bool,
    /// Only rows of these processes (thread group ids), where rows have one.
    pub pids: Option<Vec<u64>>,
    /// Rows of all namespaces, where the table shows the initial one else.
    pub all_namespaces: bool,
}

impl Selection {
    /// Whether rows of this process are wanted.
    pub fn wants_pid(&self, pid: u64) -> bool {
        self.pids.as_ref().is_none_or(|pids| pids.contains(&pid))
    }
}

/// Which rows and columns are wanted.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Indices into the table's columns, in the order wanted; `None`: all.
    pub columns: Option<Vec<usize>>,
    /// Which rows.
    pub selection: Selection,
}

/// One row: a value for each column of the request, in its order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// The values.
    pub values: Vec<Value>,
}

/// Why a table has no rows at all, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The kernel's types are not known.
    #[error("table {table}: {source}")]
    Profile {
        /// The table.
        table: &'static str,
        /// What is missing.
        source: ProfileError,
    },
    /// The kernel's types lack something that the table needs.
    #[error("table {table}: {source}")]
    Type {
        /// The table.
        table: &'static str,
        /// What is missing.
        source: TypeError,
    },
    /// A symbol that the table starts from is not in the kernel.
    #[error("table {table}: the kernel has no symbol {symbol}")]
    Symbol {
        /// The table.
        table: &'static str,
        /// The symbol.
        symbol: &'static str,
    },
    /// The memory where the table starts can't be read.
    #[error("table {table}: reading {what}: {source}")]
    Read {
        /// The table.
        table: &'static str,
        /// The object, by its kernel name.
        what: &'static str,
        /// Why not.
        source: secmon_memory::ReadError,
    },
}

/// A table, whatever its items are.
pub trait Table: Sync {
    /// Name in `snake_case`, stable: `processes`.
    fn name(&self) -> &'static str;
    /// Other names on the command line: `ps`.
    fn aliases(&self) -> &'static [&'static str];
    /// What its rows are, in a sentence.
    fn meaning(&self) -> &'static str;
    /// Its columns.
    fn columns(&self) -> Vec<ColumnInfo>;
    /// Walks the guest and gives each row to `sink` until it breaks. The sink
    /// may take the values out of it; the next row is made in the same memory.
    ///
    /// What could not be read is in the rows as [`Value::Unreadable`]; a list
    /// that ended early is in the guest's [`diagnostics`](Guest::diagnostics).
    ///
    /// # Errors
    /// [`TableError`] if the table can't be made from this guest at all.
    fn read(
        &self,
        guest: &Guest,
        request: &Request,
        sink: &mut RowSink<'_>,
    ) -> Result<(), TableError>;
}

/// Where a table hands its rows.
pub type RowSink<'s> = dyn FnMut(&mut Row) -> ControlFlow<()> + 's;

/// Where a table hands its items.
pub type Items<'s, R> = dyn FnMut(R) -> ControlFlow<()> + 's;

/// A table with items of type `R`.
pub struct TableOf<R: 'static> {
    /// Name in `snake_case`, stable.
    pub name: &'static str,
    /// Other names on the command line.
    pub aliases: &'static [&'static str],
    /// What its rows are.
    pub meaning: &'static str,
    /// Its columns.
    pub columns: &'static [Column<R>],
    /// Walks the guest and hands out items until the sink breaks. Items that
    /// the selection does not want are left out here.
    pub items: fn(&Guest, &Selection, &mut Items<'_, R>) -> Result<(), TableError>,
}

impl<R: 'static> Table for TableOf<R> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn aliases(&self) -> &'static [&'static str] {
        self.aliases
    }

    fn meaning(&self) -> &'static str {
        self.meaning
    }

    fn columns(&self) -> Vec<ColumnInfo> {
        let info = |column: &Column<R>| ColumnInfo {
            name: column.name,
            kind: column.kind,
            cost: column.cost,
            shown: column.shown,
            meaning: column.meaning,
        };
        self.columns.iter().map(info).collect()
    }

    fn read(
        &self,
        guest: &Guest,
        request: &Request,
        sink: &mut RowSink<'_>,
    ) -> Result<(), TableError> {
        let (maker, selection) = self.wanted(request);
        let mut row = Row::default();
        (self.items)(guest, &selection, &mut |item| {
            maker.make(guest, &item, &mut row);
            sink(&mut row)
        })
    }
}

impl<R: 'static> TableOf<R> {
    /// The row of one item, with the names of the columns.
    pub(crate) fn row(&self, guest: &Guest, item: &R) -> Vec<(&'static str, Value)> {
        let columns = self.columns.iter();
        columns
            .map(|column| (column.name, (column.value)(guest, item)))
            .collect()
    }

    /// How the rows of a request are made, and which.
    fn wanted(&self, request: &Request) -> (RowMaker<'_, R>, Selection) {
        let columns: Vec<&Column<R>> = match &request.columns {
            None => self.columns.iter().collect(),
            Some(indices) => indices
                .iter()
                .filter_map(|index| self.columns.get(*index))
                .collect(),
        };
        let selection = Selection {
            user_pages: columns.iter().any(|column| column.cost == Cost::UserPages),
            ..request.selection.clone()
        };
        (RowMaker { columns }, selection)
    }
}

/// A table whose rows several threads can make.
pub struct SplitTable<R: 'static> {
    /// The table, as one thread makes it.
    pub table: TableOf<R>,
    /// How its items are read by several.
    pub split: Split<R>,
}

impl<R: 'static> Table for SplitTable<R> {
    fn name(&self) -> &'static str {
        self.table.name()
    }

    fn aliases(&self) -> &'static [&'static str] {
        self.table.aliases()
    }

    fn meaning(&self) -> &'static str {
        self.table.meaning()
    }

    fn columns(&self) -> Vec<ColumnInfo> {
        self.table.columns()
    }

    fn read(
        &self,
        guest: &Guest,
        request: &Request,
        sink: &mut RowSink<'_>,
    ) -> Result<(), TableError> {
        let (maker, selection) = self.table.wanted(request);
        if self.split.read(guest, &selection, &maker, sink)? {
            return Ok(());
        }
        self.table.read(guest, request, sink)
    }
}

/// Makes the rows of one request.
pub(crate) struct RowMaker<'t, R: 'static> {
    columns: Vec<&'t Column<R>>,
}

impl<R> RowMaker<'_, R> {
    /// Makes the row of an item in the place of another one.
    #[inline]
    pub(crate) fn make(&self, guest: &Guest, item: &R, row: &mut Row) {
        let values = &mut row.values;
        values.clear();
        values.reserve_exact(self.columns.len());
        // A value that is moved as soon as it was made is loaded while its parts
        // are still being stored, for which the processor waits. Of several that
        // are moved together, only the last one is.
        let (blocks, rest) = self.columns.as_chunks::<8>();
        for block in blocks {
            let value = |index: usize| (block[index].value)(guest, item);
            let (first, second, third, fourth) = (value(0), value(1), value(2), value(3));
            let (fifth, sixth, seventh, eighth) = (value(4), value(5), value(6), value(7));
            values.push(first);
            values.push(second);
            values.push(third);
            values.push(fourth);
            values.push(fifth);
            values.push(sixth);
            values.push(seventh);
            values.push(eighth);
        }
        values.extend(rest.iter().map(|column| (column.value)(guest, item)));
    }
}
