//! Hopping windows from the panes that events were counted in.

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

use super::state::{News, StateKey, WindowState};
use crate::model::timestamp::Timestamp;
use crate::model::window::{Hopping, Span, WindowKind};
use crate::reference::Reference;

/// News of panes as news of the windows that hold them; of other meters, windows are panes.
pub fn in_windows(news: FxHashMap<StateKey, News>, reference: &Reference, timezone: chrono_tz::Tz) -> FxHashMap<StateKey, News> {
    let mut of_windows: FxHashMap<StateKey, News> = FxHashMap::default();
    for (key, news) in news {
        let kind = reference.meters.get(key.meter as usize).map(|meter| meter.window);
        let starts = match kind {
            Some(WindowKind::Hopping(hopping)) => {
                let windows = hopping.windows(hopping.pane(key.window_start, timezone), timezone);
                windows.iter().map(|window| window.start).collect()
            }
            _ => vec![key.window_start],
        };
        for window_start in starts {
            of_windows.entry(StateKey { window_start, ..key }).or_default().merge(news);
        }
    }
    of_windows
}

/// The windows of one accumulation by their start; each is its panes together.
pub fn windows(panes: &[(StateKey, WindowState)], hopping: Hopping, timezone: chrono_tz::Tz) -> BTreeMap<Timestamp, WindowState> {
    let mut windows: BTreeMap<Timestamp, WindowState> = BTreeMap::new();
    for (key, pane) in panes {
        let span = Span { start: key.window_start, end: pane.window_end };
        for window in hopping.windows(span, timezone) {
            match windows.get_mut(&window.start) {
                Some(state) => state.merge(pane, None),
                None => {
                    windows.insert(window.start, pane.clone());
                }
            }
            if let Some(state) = windows.get_mut(&window.start) {
                state.window_end = window.end;
            }
        }
    }
    windows
}
