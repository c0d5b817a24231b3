//! The database: its tables, what is written and what is read.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Transaction, params};
use secmon_watch::{Event, FindingRecord, Incident, TargetChange};
use serde::de::DeserializeOwned;

/// The version of the tables.
const VERSION: i64 = 1;
/// Marks the file as ours: `SecM`.
const APPLICATION: i64 = 0x5365_634d;
/// How long another process may have the file locked.
const PATIENCE: Duration = Duration::from_secs(5);

/// The tables. Moments are milliseconds since 1970-01-01T00:00:00Z; documents
/// are JSON.
const TABLES: &str = "
CREATE TABLE finding (
    number INTEGER PRIMARY KEY,
    target TEXT NOT NULL,
    id TEXT NOT NULL,
    detector TEXT NOT NULL,
    name TEXT NOT NULL,
    class TEXT NOT NULL,
    severity TEXT NOT NULL,
    technique TEXT,
    about TEXT NOT NULL,
    summary TEXT NOT NULL,
    trust_level TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'gone', 'unknown')),
    first_seen_ms INTEGER NOT NULL,
    last_told_ms INTEGER NOT NULL,
    appearances INTEGER NOT NULL,
    document TEXT NOT NULL,
    UNIQUE (target, id)
) STRICT;
CREATE TABLE event (
    number INTEGER PRIMARY KEY,
    run TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    time_ms INTEGER NOT NULL,
    target TEXT NOT NULL,
    event TEXT NOT NULL,
    finding INTEGER REFERENCES finding (number),
    document TEXT NOT NULL,
    UNIQUE (run, sequence, time_ms)
) STRICT;
CREATE INDEX event_by_time ON event (time_ms);
";

/// Why the database can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite's reason.
    #[error("{path}: {source}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: rusqlite::Error,
    },
    /// The file is another program's.
    #[error("{path} is a database of something else: name another file")]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The tables are of another version.
    #[error(
        "{path} is of version {found}; this program reads version {VERSION}: name another file, or use the release that wrote it"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
}

/// An open database.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    path: PathBuf,
}

/// Which findings are wanted.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Only of this target.
    pub target: Option<String>,
    /// Only of these detectors; empty: all.
    pub detectors: Vec<String>,
    /// Only those that were told at this moment or later.
    pub since_ms: Option<u64>,
    /// Only those of this state.
    pub state: Option<StateFilter>,
}

/// What has become of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateFilter {
    /// It was there when it was last looked for.
    Open,
    /// It is not there any more.
    Gone,
    /// The watch ended while it was there, and has not found it again since.
    Unknown,
}

impl StateFilter {
    /// Its name, as it stands in the database.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Gone => "gone",
            Self::Unknown => "unknown",
        }
    }
}

/// A finding and its life.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredFinding {
    /// Its number in the database.
    pub number: u64,
    /// The target.
    pub target: String,
    /// Open, gone or unknown.
    pub state: String,
    /// When it was first told.
    pub first_seen_ms: u64,
    /// When it was last told: that it appeared, changed or was gone.
    pub last_told_ms: u64,
    /// How often it appeared.
    pub appearances: u64,
    /// How well the monitor that said so was protected.
    pub trust_level: String,
    /// The finding as it was told last.
    pub record: FindingRecord,
}

/// An event.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredEvent {
    /// Its number in the database.
    pub number: u64,
    /// Which run of a watch told it.
    pub run: String,
    /// The event.
    pub event: Event,
}

impl Store {
    /// Opens a database to write to; makes it if it is not there.
    ///
    /// # Errors
    /// [`StoreError`] if that can't be, or if the file is something else.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut store = Self::with(path, flags)?;
        store.prepare()?;
        Ok(store)
    }

    /// Opens a database that is there, to read alone.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_to_read(path: &Path) -> Result<Self, StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let store = Self::with(path, flags)?;
        store.check()?;
        Ok(store)
    }

    fn with(path: &Path, flags: OpenFlags) -> Result<Self, StoreError> {
        let error = |source| StoreError::Sqlite {
            path: path.to_owned(),
            source,
        };
        let connection = Connection::open_with_flags(path, flags).map_err(error)?;
        connection.busy_timeout(PATIENCE).map_err(error)?;
        Ok(Self {
            connection,
            path: path.to_owned(),
        })
    }

    fn error(&self, source: rusqlite::Error) -> StoreError {
        StoreError::Sqlite {
            path: self.path.clone(),
            source,
        }
    }

    /// Whether the file is ours, and of which version.
    fn check(&self) -> Result<i64, StoreError> {
        let number = |pragma| {
            self.connection
                .pragma_query_value(None, pragma, |row| row.get::<_, i64>(0))
                .map_err(|source| self.error(source))
        };
        let (application, version) = (number("application_id")?, number("user_version")?);
        if application != APPLICATION {
            let path = self.path.clone();
            return Err(StoreError::Foreign { path });
        }
        if version != VERSION {
            return Err(StoreError::Version {
                path: self.path.clone(),
                found: version,
            });
        }
        Ok(version)
    }

    fn prepare(&mut self) -> Result<(), StoreError> {
        let is_new = self
            .connection
            .query_row("SELECT count(*) FROM sqlite_schema", [], |row| {
                row.get::<_, i64>(0)
            })
            .map_err(|source| self.error(source))?
            == 0;
        let set = |store: &Self, pragma, value: &str| {
            store
                .connection
                .pragma_update(None, pragma, value)
                .map_err(|source| store.error(source))
        };
        // A journal that is undone at the next start; each commit is on the
        // disk before it is one. (A write-ahead log would need a file that is
        // mapped as memory, which a full disk turns into a signal.)
        set(self, "journal_mode", "TRUNCATE")?;
        set(self, "synchronous", "FULL")?;
        set(self, "foreign_keys", "ON")?;
        if is_new {
            let made = (|| {
                let transaction = self.connection.transaction()?;
                transaction.execute_batch(TABLES)?;
                transaction.pragma_update(None, "application_id", APPLICATION)?;
                transaction.pragma_update(None, "user_version", VERSION)?;
                transaction.commit()
            })();
            made.map_err(|source| self.error(source))?;
        }
        self.check().map(drop)
    }

    /// Writes events of a run in one transaction: all of them are on the disk
    /// afterwards, or none. One that is there already is left as it is.
    ///
    /// # Errors
    /// [`StoreError`] if they can't be written.
    pub fn put<'a>(
        &mut self,
        run: &str,
        events: impl IntoIterator<Item = &'a Event>,
    ) -> Result<(), StoreError> {
        let written = (|| {
            let transaction = self.connection.transaction()?;
            for event in events {
                put(&transaction, run, event)?;
            }
            transaction.commit()
        })();
        written.map_err(|source| self.error(source))
    }

    /// The findings that are wanted, the latest told last.
    ///
    /// # Errors
    /// [`StoreError`] if they can't be read.
    pub fn findings(&self, query: &Query) -> Result<Vec<StoredFinding>, StoreError> {
        let read = (|| {
            let mut statement = self.connection.prepare(
                "SELECT number, target, state, first_seen_ms, last_told_ms, appearances,
                        trust_level, document, detector
                 FROM finding
                 WHERE (?1 IS NULL OR target = ?1) AND (?2 IS NULL OR last_told_ms >= ?2)
                   AND (?3 IS NULL OR state = ?3)
                 ORDER BY last_told_ms, number",
            )?;
            let state = query.state.map(StateFilter::name);
            let since = query.since_ms.map(signed);
            let mut rows = statement.query(params![query.target, since, state])?;
            let mut findings = Vec::new();
            while let Some(row) = rows.next()? {
                let detector: String = row.get(8)?;
                if !query.detectors.is_empty() && !query.detectors.contains(&detector) {
                    continue;
                }
                findings.push(StoredFinding {
                    number: unsigned(row.get(0)?),
                    target: row.get(1)?,
                    state: row.get(2)?,
                    first_seen_ms: unsigned(row.get(3)?),
                    last_told_ms: unsigned(row.get(4)?),
                    appearances: unsigned(row.get(5)?),
                    trust_level: row.get(6)?,
                    record: document(7, &row.get::<_, String>(7)?)?,
                });
            }
            Ok(findings)
        })();
        read.map_err(|source| self.error(source))
    }

    /// The events since a moment, in their order.
    ///
    /// # Errors
    /// [`StoreError`] if they can't be read.
    pub fn events(&self, since_ms: u64) -> Result<Vec<StoredEvent>, StoreError> {
        let read = (|| {
            let mut statement = self.connection.prepare(
                "SELECT number, run, document FROM event WHERE time_ms >= ?1 ORDER BY number",
            )?;
            let mut rows = statement.query([signed(since_ms)])?;
            let mut events = Vec::new();
            while let Some(row) = rows.next()? {
                events.push(StoredEvent {
                    number: unsigned(row.get(0)?),
                    run: row.get(1)?,
                    event: document(2, &row.get::<_, String>(2)?)?,
                });
            }
            Ok(events)
        })();
        read.map_err(|source| self.error(source))
    }
}

/// One event, and what it means for its finding.
fn put(transaction: &Transaction<'_>, run: &str, event: &Event) -> rusqlite::Result<()> {
    let text = |value: serde_json::Result<String>| {
        value.map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
    };
    let target = &event.target;
    let time = signed(event.time_ms);
    let number = event.incident.finding().and_then(|finding| {
        let stored = transaction.query_row(
            "SELECT number FROM finding WHERE target = ?1 AND id = ?2",
            params![target, finding.id],
            |row| row.get::<_, i64>(0),
        );
        stored.optional().transpose()
    });
    let number = number.transpose()?;
    let added = transaction.execute(
        "INSERT OR IGNORE INTO event (run, sequence, time_ms, target, event, finding, document)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        params![
            run,
            signed(event.sequence),
            time,
            target,
            event.incident.name(),
            number,
            text(serde_json::to_string(event))?,
        ],
    )?;
    if added == 0 {
        return Ok(());
    }
    let own = transaction.last_insert_rowid();
    let (finding, state, appearances) = match &event.incident {
        Incident::Appeared { finding } => (finding, "open", 1),
        Incident::Changed { finding, .. } => (finding, "open", 0),
        Incident::Gone { finding, .. } => (finding, "gone", 0),
        Incident::Started { .. } => {
            transaction.execute(
                "UPDATE finding SET state = 'unknown' WHERE target = ?1 AND state = 'open'",
                [target],
            )?;
            return Ok(());
        }
        Incident::Target { change, .. } => {
            if matches!(change, TargetChange::Gone | TargetChange::Rebooted) {
                transaction.execute(
                    "UPDATE finding SET state = 'gone', last_told_ms = ?2
                     WHERE target = ?1 AND state <> 'gone'",
                    params![target, time],
                )?;
            }
            return Ok(());
        }
        _ => return Ok(()),
    };
    transaction.execute(
        "INSERT INTO finding (target, id, detector, name, class, severity, technique, about,
                              summary, trust_level, state, first_seen_ms, last_told_ms,
                              appearances, document)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?12, 1, ?13)
         ON CONFLICT (target, id) DO UPDATE SET
             class = excluded.class, severity = excluded.severity, about = excluded.about,
             summary = excluded.summary, trust_level = excluded.trust_level,
             state = excluded.state, last_told_ms = excluded.last_told_ms,
             appearances = appearances + ?14, document = excluded.document",
        params![
            target,
            finding.id,
            finding.detector,
            finding.name,
            finding.class.name(),
            finding.severity.name(),
            finding.technique,
            finding.about,
            finding.summary,
            event.trust_level.name(),
            state,
            time,
            text(serde_json::to_string(finding))?,
            appearances,
        ],
    )?;
    transaction.execute(
        "UPDATE event SET finding =
             (SELECT number FROM finding WHERE target = ?1 AND id = ?2) WHERE number = ?3",
        params![target, finding.id, own],
    )?;
    Ok(())
}

fn document<T: DeserializeOwned>(column: usize, text: &str) -> rusqlite::Result<T> {
    serde_json::from_str(text).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, error.into())
    })
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
