//! Whether the monitor answers: a thread asks it again and again. Each answer is
//! one of the session's own, encrypted and counted, so an old one is no answer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use secmon_guard::{Finding, Kind};
use secmon_monitor::launch::MonitorName;
use secmon_monitor::launch::connect::connect;

/// Between two challenges.
const PAUSE: Duration = Duration::from_millis(500);
/// How long a conversation may take to begin.
const BEGIN: Duration = Duration::from_secs(10);

/// When the monitor answered last, and why not since.
struct Last {
    answer: Option<Instant>,
    since: Instant,
    error: String,
}

/// The thread that asks.
pub struct Answers {
    last: Arc<Mutex<Last>>,
}

fn lock(last: &Mutex<Last>) -> MutexGuard<'_, Last> {
    last.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Answers {
    /// Begins to ask.
    pub fn start(name: MonitorName) -> Self {
        let last = Arc::new(Mutex::new(Last {
            answer: None,
            since: Instant::now(),
            error: String::new(),
        }));
        let shared = Arc::clone(&last);
        // It ends with the process.
        thread::spawn(move || ask(&name, &shared));
        Self { last }
    }

    /// Waits until it answered once.
    pub fn wait(&self, patience: Duration) {
        let begun = Instant::now();
        loop {
            let answered = lock(&self.last).answer.is_some_and(|at| at >= begun);
            if answered || begun.elapsed() > patience {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// That it did not answer for longer than `deadline`.
    pub fn silent(&self, deadline: Duration) -> Option<Finding> {
        let last = lock(&self.last);
        let age = last.answer.unwrap_or(last.since).elapsed();
        (age > deadline).then(|| {
            let mut seen = format!("none for {:.1} s", age.as_secs_f64());
            if !last.error.is_empty() {
                seen = format!("{seen}: {}", last.error);
            }
            let expected = format!("an answer within {:.1} s", deadline.as_secs_f64());
            Finding::new(Kind::Silent, "the monitor's channel", expected, seen)
        })
    }
}

fn ask(name: &MonitorName, last: &Mutex<Last>) {
    loop {
        let mut connection = match connect(name, Instant::now() + BEGIN, &mut |_| {}) {
            Ok(connection) => connection,
            Err(error) => {
                lock(last).error = error.to_string();
                thread::sleep(PAUSE);
                continue;
            }
        };
        loop {
            match connection.client.status() {
                Ok(_) => {
                    let mut last = lock(last);
                    last.answer = Some(Instant::now());
                    last.error.clear();
                }
                Err(error) => {
                    lock(last).error = error.to_string();
                    break;
                }
            }
            thread::sleep(PAUSE);
        }
    }
}
