//! Which stored sessions became which.

use rustc_hash::{FxHashMap, FxHashSet};

use super::price::PricedWindow;
use super::state::News;
use crate::model::aggregate::{PeriodKey, StoredWindow, WindowKey};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;

/// What became of sessions.
#[derive(Debug, Default)]
pub struct SessionChanges {
    /// Sessions that were joined or split: none of them is the same as before.
    pub rebuilt: FxHashSet<WindowKey>,
    /// For each session, the news of all that it was joined with or split from.
    pub news: FxHashMap<WindowKey, News>,
}

/// A session, or an event that is withdrawn from one.
struct Item<'a> {
    period: &'a PeriodKey,
    span: Span,
    /// Whether it is stored; `None` for an event.
    session: Option<(&'a WindowKey, bool)>,
    news: News,
}

impl SessionChanges {
    /// Finds which stored sessions overlap which computed ones.
    pub fn find(
        stored: &[StoredWindow],
        computed: &[PricedWindow],
        withdrawn: &FxHashMap<WindowKey, News>,
        is_session: impl Fn(&PeriodKey) -> bool,
    ) -> SessionChanges {
        let mut items = Vec::new();
        for StoredWindow { row, .. } in stored.iter().filter(|stored| is_session(&stored.row.key.period)) {
            let session = Some((&row.key, true));
            items.push(Item { period: &row.key.period, span: row.window(), session, news: News::default() });
        }
        for PricedWindow { row, news } in computed.iter().filter(|computed| is_session(&computed.row.key.period)) {
            items.push(Item { period: &row.key.period, span: row.window(), session: Some((&row.key, false)), news: news.all() });
        }
        for (key, news) in withdrawn.iter().filter(|(key, _)| is_session(&key.period)) {
            let end = Timestamp::from_nanos(key.window_start.nanos().saturating_add(1));
            let span = Span { start: key.window_start, end };
            items.push(Item { period: &key.period, span, session: None, news: *news });
        }
        items.sort_unstable_by_key(|item| (item.period, item.span));
        let mut changes = SessionChanges::default();
        let mut rest = items.as_slice();
        while let Some(first) = rest.first() {
            let mut end = first.span.end;
            let mut length = 0;
            for item in rest.iter().take_while(|item| item.period == first.period) {
                if item.span.start >= end {
                    break;
                }
                end = end.max(item.span.end);
                length += 1;
            }
            let (cluster, others) = rest.split_at(length.max(1));
            changes.note(cluster);
            rest = others;
        }
        changes
    }

    fn note(&mut self, cluster: &[Item<'_>]) {
        let mut news = News::default();
        cluster.iter().for_each(|item| news.merge(item.news));
        let sessions: Vec<_> = cluster.iter().filter_map(|item| item.session).collect();
        let is_same = matches!(sessions.as_slice(), [(a, was), (b, is)] if a == b && was != is);
        for (key, _) in &sessions {
            self.news.insert((*key).clone(), news);
            if !is_same {
                self.rebuilt.insert((*key).clone());
            }
        }
    }
}
