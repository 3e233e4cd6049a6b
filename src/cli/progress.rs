//! Progress on a terminal, for anything longer than a second.

use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{HumanFloatCount, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::clock::Stopwatch;
use crate::pipeline::Observer;

/// Shows what is going on, once it has lasted a second.
pub struct Progress {
    /// Whether there is a terminal to show it on.
    visible: bool,
    watch: Stopwatch,
    rows: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    name: &'static str,
    ahead: Option<u64>,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Nothing is shown unless stderr is a terminal.
    pub fn new(quiet: bool) -> Self {
        Progress {
            visible: !quiet && std::io::stderr().is_terminal(),
            watch: Stopwatch::start(),
            rows: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }

    fn show(&self) {
        if !self.visible {
            return;
        }
        let Ok(mut state) = self.state.lock() else { return };
        let rows = self.rows.load(Ordering::Relaxed);
        let (name, ahead) = (state.name, state.ahead);
        let bar = state.bar.get_or_insert_with(|| ProgressBar::with_draw_target(ahead, ProgressDrawTarget::hidden()));
        bar.set_position(rows);
        if self.watch.seconds() < 1.0 || !bar.is_hidden() {
            return;
        }
        let template = match ahead {
            Some(_) => "{msg:10} {wide_bar} {human_pos}/{human_len} events  {rate}  {eta}",
            None => "{msg:10} {spinner} {human_pos} events  {rate}",
        };
        let rate = |progress: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = write!(out, "{:.0}/s", HumanFloatCount(progress.per_sec()));
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.with_key("rate", rate));
        }
        bar.set_message(name);
        bar.set_draw_target(ProgressDrawTarget::stderr());
        bar.enable_steady_tick(Duration::from_millis(200));
    }
}

impl Observer for Progress {
    fn step(&self, name: &'static str, rows: Option<u64>) {
        self.rows.store(0, Ordering::Relaxed);
        if let Ok(mut state) = self.state.lock() {
            if let Some(bar) = state.bar.take() {
                bar.finish_and_clear();
            }
            (state.name, state.ahead) = (name, rows);
        }
        self.show();
    }

    fn rows(&self, rows: u64) {
        self.rows.fetch_add(rows, Ordering::Relaxed);
        self.show();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Ok(mut state) = self.state.lock()
            && let Some(bar) = state.bar.take()
        {
            bar.finish_and_clear();
        }
    }
}
