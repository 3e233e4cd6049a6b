//! Enrichment: every event ends in a bucket, every value that counts in a match.
//!
//! Each thread has a [`Matcher`]; merging them gives the same whatever event went to which.

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};
use xxhash_rust::xxh3::xxh3_128;

use super::accumulator::{Measured, Moment};
use super::aggregate::{AllMatches, Shard};
use super::context::Context;
use super::deduplicate::{Copies, key_hash};
use super::enrich::{Memo, MeterPlan, Rejection};
use super::event_forms::{event_json, identity};
use super::held::{self, Held};
use super::letters::VisitedLetters;
use super::matches::{Arrived, Match, Matches, NO_WINDOW};
use super::places::{Numbered, Places};
use super::purpose::{Arrival, Loss, Purpose};
use super::state::{Interner, NO_DIMENSIONS, NO_PRICE, News, StateKey, index};
use super::times::Times;
use crate::model::aggregate::{DeadLetter, DeadLetterKey, Reason};
use crate::model::counts::{EventCounts, UsageCounts};
use crate::model::meter::Aggregation;
use crate::model::property::Property;
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowKind};
use crate::source::{EventBatch, EventRef, RowChoice};

/// What became of some events.
#[derive(Debug)]
pub struct Outcome {
    pub counted: Vec<StateKey>,
    pub rejected: Vec<DeadLetter>,
    pub skipped: u64,
}

/// What became of a match: small, for it is handed over by the million.
enum Taken {
    Counted,
    Skipped,
    Rejected(Box<Rejection>),
}

/// What one thread has seen.
pub struct Matcher<'c, 'r> {
    context: &'c Context<'r>,
    matches: Matches,
    /// What other threads matched.
    shards: Vec<Shard>,
    /// News of windows that lost events.
    pub withdrawn: FxHashMap<StateKey, News>,
    pub dimensions: Interner,
    pub dead_letters: Vec<DeadLetter>,
    pub events: EventCounts,
    pub usage: UsageCounts,
    pub held: Held,
    pub ingested_until: Option<Timestamp>,
    pub times: Times,
    pub visited: VisitedLetters,
    /// How many copies were held by the hash of their key, where not all rows are read.
    pub copies: FxHashMap<u64, u64>,
    /// The identities of chosen events, where an earlier run has kept matches of them.
    pub read_again: FxHashSet<u128>,
    /// The windows that the event at hand is withdrawn from.
    replaced: Vec<StateKey>,
    places: Places<'r>,
    /// For the dimensions of the event at hand.
    text: String,
    memo: Memo<'c, 'r>,
}

/// An event, its subscription, and its place in time.
struct At<'e> {
    event: &'e EventRef<'e>,
    t: Timestamp,
    identity: u128,
    subscription: usize,
    window: Numbered,
    period: Numbered,
}

impl<'c, 'r> Matcher<'c, 'r> {
    pub fn new(context: &'c Context<'r>) -> Self {
        Matcher {
            context,
            matches: Matches::new(&context.parts, context.keep_in.as_deref()),
            shards: Vec::new(),
            withdrawn: FxHashMap::default(),
            dimensions: Interner::starting_with("{}"),
            dead_letters: Vec::new(),
            events: EventCounts::default(),
            usage: UsageCounts::default(),
            held: Held::default(),
            ingested_until: None,
            times: Times::since(context.times_before),
            visited: VisitedLetters::default(),
            copies: FxHashMap::default(),
            read_again: FxHashSet::default(),
            replaced: Vec::new(),
            memo: Memo::default(),
            places: Places::new(context.enricher.reference, context.timezone),
            text: String::new(),
        }
    }

    /// Takes the events of a batch. `is_known` says whether an event of that time, and
    /// ingested at that time, was there in the run before.
    ///
    /// # Errors
    /// Where copies of events cannot be set aside.
    pub fn visit(&mut self, batch: &EventBatch, is_known: impl Fn(Option<Timestamp>, Timestamp) -> bool) -> Result<()> {
        self.memo.begin_batch();
        let mut slots = Vec::new();
        self.visit_all(batch.rows(), &is_known, &mut slots)
    }

    /// As [`Matcher::visit`], for the rows that `choice` wants: the others are not read.
    ///
    /// # Errors
    /// As [`Matcher::visit`].
    pub fn visit_chosen(
        &mut self,
        batch: &EventBatch,
        choice: &dyn RowChoice,
        is_known: impl Fn(Option<Timestamp>, Timestamp) -> bool,
    ) -> Result<()> {
        self.memo.begin_batch();
        let mut slots = Vec::new();
        let (context, mut read_again) = (self.context, std::mem::take(&mut self.read_again));
        let chosen = batch.rows().filter(|event| choice.wants(event)).inspect(|event| {
            if let Some(t) = event.timestamp.filter(|_| context.has_kept) {
                read_again.insert(identity(event, t));
            }
        });
        let visited = self.visit_all(chosen, &is_known, &mut slots);
        self.read_again = read_again;
        visited
    }

    /// Events a few at a time: the hashes of their keys are looked up together, for the processor
    /// waits for memory only once then.
    fn visit_all<'e>(
        &mut self,
        mut events: impl Iterator<Item = EventRef<'e>>,
        is_known: &impl Fn(Option<Timestamp>, Timestamp) -> bool,
        slots: &mut Vec<Property<'e>>,
    ) -> Result<()> {
        const TOGETHER: usize = 32;
        let (mut together, mut hashes) = (Vec::with_capacity(TOGETHER), Vec::with_capacity(TOGETHER));
        loop {
            together.clear();
            together.extend(events.by_ref().take(TOGETHER));
            if together.is_empty() {
                return Ok(());
            }
            let context = self.context;
            hashes.clear();
            hashes.extend(together.iter().map(|event| key_hash(&context.rules.key, event)));
            let mut may_repeat = 0_u32;
            for (at, hash) in hashes.iter().enumerate() {
                may_repeat |= u32::from(hash.is_some_and(|hash| context.repeated.may_contain(hash))) << at;
            }
            for ((at, event), hash) in together.iter().enumerate().zip(&hashes) {
                self.visit_event(event, hash.filter(|_| may_repeat >> at & 1 == 1), is_known, slots)?;
            }
        }
    }

    /// `hash` is that of its key, where that may repeat.
    fn visit_event<'e>(
        &mut self,
        event: &EventRef<'e>,
        hash: Option<u64>,
        is_known: &impl Fn(Option<Timestamp>, Timestamp) -> bool,
        slots: &mut Vec<Property<'e>>,
    ) -> Result<()> {
        self.events.read += 1;
        let ingested_at = event.ingested_at.or(event.timestamp);
        self.ingested_until = self.ingested_until.max(ingested_at);
        let known = is_known(event.timestamp, ingested_at.unwrap_or(Timestamp::MIN));
        if let Some(hash) = hash.filter(|hash| self.context.repeated.contains(*hash)) {
            if self.context.marks.is_some() {
                *self.copies.entry(hash).or_default() += 1;
            }
            return self.held.hold(hash, event, known);
        }
        let arrival = if known { Arrival::Known } else { Arrival::Late };
        self.take(event, Purpose::Count(arrival), slots)
    }

    /// Decides about the copies of keys that repeat in one part of what was set aside.
    ///
    /// # Errors
    /// Where the part is damaged, or matches cannot be set aside.
    pub fn settle(&mut self, part: &[u8]) -> Result<()> {
        let problems = held::problems(part)?;
        for copies in held::by_key(part, &problems, self.context.rules)? {
            if let Some(copies) = Copies::of(&copies, self.context.rules.keep, |copy| self.lose(copy)) {
                self.resolve(&copies)?;
            }
        }
        Ok(())
    }

    /// Counts out a copy that does not count. One without a time is a duplicate: nothing
    /// says that it is out of range.
    fn lose(&mut self, copy: &EventRef<'_>) {
        self.times.lose(copy.timestamp);
        let inside = copy.timestamp.is_none_or(|t| self.context.range.contains(t)) && self.wants_tenant(copy);
        *(if inside { &mut self.events.duplicates } else { &mut self.events.out_of_range }) += 1;
    }

    /// Takes an event of which several copies were read.
    ///
    /// # Errors
    /// Where matches cannot be set aside.
    pub fn resolve(&mut self, copies: &Copies<'_>) -> Result<()> {
        self.memo.begin_batch();
        let keep = self.context.rules.keep;
        let before = copies.counted_before(keep);
        let mut slots = Vec::new();
        let is_void = copies.is_void(keep);
        let replaces = before.is_some() && !copies.kept.known;
        self.replaced.clear();
        if let Some(before) = before.filter(|_| is_void || replaces) {
            let loss = match is_void {
                true => Loss::Voided,
                false if before.says_the_same(&copies.kept) => Loss::Duplicate,
                false => Loss::Amended,
            };
            self.take(&before.event, Purpose::Withdraw(loss), &mut slots)?;
        }
        if is_void {
            self.times.lose(copies.kept.event.timestamp);
            self.void(&copies.kept.event);
            return Ok(());
        }
        let arrival = match (copies.kept.known, replaces) {
            (true, _) => Arrival::Known,
            (false, true) => Arrival::Amended,
            (false, false) => Arrival::Late,
        };
        self.take(&copies.kept.event, Purpose::Count(arrival), &mut slots)
    }

    /// Takes an event of which only one copy was read, as it was there before.
    ///
    /// # Errors
    /// Where matches cannot be set aside.
    pub fn take_single(&mut self, event: &EventRef<'_>) -> Result<()> {
        self.memo.begin_batch();
        self.take(event, Purpose::Count(Arrival::Known), &mut Vec::new())
    }

    /// What became of the events taken since the last call. Sessions are not closed:
    /// their keys name the billing period.
    ///
    /// # Errors
    /// Where what was set aside cannot be read.
    pub fn take_outcome(&mut self) -> Result<Outcome> {
        let skipped = std::mem::take(&mut self.usage).skipped;
        (self.events, self.withdrawn) = (EventCounts::default(), FxHashMap::default());
        let mut found = Vec::new();
        self.matches.drain(|of| {
            let key = StateKey {
                subscription: of.subscription,
                meter: of.meter,
                price: of.price,
                dimensions: of.dimensions,
                period_start: Timestamp::MIN,
                window_start: Timestamp::MIN,
            };
            let is_session = of.window == NO_WINDOW;
            found.push((key, of.period, if is_session { of.period } else { of.window }));
        })?;
        let spans = &self.matches.spans;
        let start = |number: u32| Some(spans.span(number)?.start);
        let counted = found.into_iter().filter_map(|(key, period, window)| {
            Some(StateKey { period_start: start(period)?, window_start: start(window)?, ..key })
        });
        Ok(Outcome { counted: counted.collect(), rejected: std::mem::take(&mut self.dead_letters), skipped })
    }

    fn wants_tenant(&self, event: &EventRef<'_>) -> bool {
        event.tenant_id.is_none_or(|tenant| self.context.enricher.wants_tenant(tenant))
    }

    fn void(&mut self, event: &EventRef<'_>) {
        self.note_visit(event);
        // A tombstone may carry no time; it voids its id all the same.
        if self.wants_tenant(event) && event.timestamp.is_none_or(|t| self.context.range.contains(t)) {
            self.events.voided += 1;
        } else {
            self.events.out_of_range += 1;
        }
    }

    /// Notes that an event was judged again; where everything is computed, all are.
    fn note_visit(&mut self, event: &EventRef<'_>) {
        if self.context.marks.is_some() {
            self.visited.visit(&self.context.open_dead_letters, event);
        }
    }

    /// One event, from its fields to its matches.
    fn take<'e>(&mut self, event: &EventRef<'e>, purpose: Purpose, slots: &mut Vec<Property<'e>>) -> Result<()> {
        let context = self.context;
        let counting = matches!(purpose, Purpose::Count(_));
        if event.deleted && event.problem.is_none() && event.missing_field().is_none() {
            let whole = EventRef { deleted: false, ..*event };
            // What it voids may be gone from the source: it tells where that was itself.
            if purpose == Purpose::Count(Arrival::Late) && whole.missing_field().is_none() {
                self.take(&whole, Purpose::Withdraw(Loss::Voided), slots)?;
            }
            self.void(event);
            return Ok(());
        }
        if counting {
            self.times.add(event.timestamp);
        }
        if !self.wants_tenant(event) {
            self.events.out_of_range += u64::from(counting);
            return Ok(());
        }
        if counting {
            self.note_visit(event);
        }
        if let Some(detail) = event.fault() {
            let outside = event.timestamp.is_some_and(|t| !context.range.contains(t));
            self.reject_event(event, counting, !outside, &Rejection { reason: Reason::MalformedEvent, detail });
            return Ok(());
        }
        let (Some(tenant), Some(name), Some(external_id), Some(t)) =
            (event.tenant_id, event.event_name, event.external_customer_id, event.timestamp)
        else {
            return Ok(());
        };
        if Timestamp::in_range(t.nanos()).is_none() {
            let detail = format!("timestamp {t} is outside of the years 1700 to 2199");
            self.reject_event(event, counting, true, &Rejection { reason: Reason::MalformedEvent, detail });
            return Ok(());
        }
        let in_range = context.range.contains(t);
        // A level reaches from any earlier event into the range.
        let is_needed = in_range || context.reach.contains(t);
        let only_levels = !is_needed && context.enricher.has_levels() && t < context.reach.end;
        if !(is_needed || only_levels) {
            self.events.out_of_range += u64::from(counting);
            return Ok(());
        }
        let Some(plan) = self.memo.plans.get([name], || context.enricher.plan(name)) else {
            self.count_event(counting, in_range, |events| &mut events.unmatched);
            return Ok(());
        };
        if let Err(error) = plan.properties.read(event.properties, slots) {
            let detail = format!("properties are no JSON object: {error}");
            self.reject_event(event, counting, in_range, &Rejection { reason: Reason::MalformedEvent, detail });
            return Ok(());
        }
        let slots = slots.as_slice();
        if !plan.meters.iter().any(|meter| meter.accepts(slots)) {
            let in_range = in_range && !plan.known_outside;
            self.count_event(counting, in_range, |events| &mut events.unmatched);
            return Ok(());
        }
        let customer =
            self.memo.customers.get([tenant, external_id], || context.enricher.reference.customer(tenant, external_id));
        if !context.enricher.wants_customer(customer, t) {
            self.count_event(counting, false, |events| &mut events.metered);
            return Ok(());
        }
        if counting && context.enricher.is_of_few() {
            self.visited.visit(&context.open_dead_letters, event);
        }
        let subscription = match context.enricher.subscription_of(customer, external_id, t) {
            Ok(subscription) => subscription,
            Err(rejection) => {
                self.reject_event(event, counting, in_range, &rejection);
                return Ok(());
            }
        };
        let was_open = |meter: Option<usize>| counting && context.open_dead_letters.holds(event, meter);
        let event_was_open = was_open(None);
        let identity = identity(event, t);
        let (mut usable, mut rejected) = (false, false);
        for meter in plan.meters.iter().filter(|meter| meter.accepts(slots)) {
            if only_levels && meter.meter.aggregation != Aggregation::WeightedSum {
                continue;
            }
            let Some((window, period)) = self.places.find(t, subscription, meter, &mut self.matches.spans) else { continue };
            if context.marks.as_ref().is_some_and(|marks| !marks.hold_event(subscription, meter.index, period.span, t)) {
                self.visited.leave_out(&context.open_dead_letters, event, meter.index);
                continue;
            }
            let resolved = event_was_open || was_open(Some(meter.index));
            let at = At { event, t, identity, subscription, window, period };
            let outcome = self.take_match(&at, meter, slots, purpose, resolved)?;
            // A longer window can reach out of the range: its match is for another run.
            let is_session = matches!(meter.meter.window, WindowKind::Session { .. });
            if !counting || !in_range || !(is_session || context.range.covers(window.span)) {
                continue;
            }
            self.usage.matches += 1;
            match outcome {
                Taken::Counted => (self.usage.counted, usable) = (self.usage.counted + 1, true),
                Taken::Skipped => (self.usage.skipped, usable) = (self.usage.skipped + 1, true),
                Taken::Rejected(rejection) => {
                    (self.usage.rejected, rejected) = (self.usage.rejected + 1, true);
                    self.dead_letter(event, Some(&meter.meter.id), &rejection);
                }
            }
        }
        self.count_event(counting, in_range && (usable || rejected), |events| {
            if usable { &mut events.metered } else { &mut events.dead_lettered }
        });
        Ok(())
    }

    fn count_event(&mut self, counting: bool, in_range: bool, bucket: impl Fn(&mut EventCounts) -> &mut u64) {
        if counting {
            *(if in_range { bucket(&mut self.events) } else { &mut self.events.out_of_range }) += 1;
        }
    }

    fn reject_event(&mut self, event: &EventRef<'_>, counting: bool, in_range: bool, rejection: &Rejection) {
        self.count_event(counting, in_range, |events| &mut events.dead_lettered);
        if counting && in_range {
            self.dead_letter(event, None, rejection);
        }
    }

    /// One match of an event with a meter.
    fn take_match(
        &mut self,
        at: &At<'_>,
        plan: &MeterPlan<'r>,
        slots: &[Property<'_>],
        purpose: Purpose,
        resolved: bool,
    ) -> Result<Taken> {
        let (value, price) = match self.context.enricher.charge(at.subscription, plan, at.t, slots) {
            Ok(Some(charged)) => charged,
            Ok(None) => return Ok(Taken::Skipped),
            Err(rejection) => return Ok(Taken::Rejected(Box::new(rejection))),
        };
        let is_level = plan.meter.aggregation == Aggregation::WeightedSum;
        let (window, period) = (at.window.span, at.period.span);
        let reaches_range = is_level && period.start < self.context.range.end;
        if !period.overlaps(self.context.range) && !reaches_range {
            // Another subscription's longer period made this event be read.
            return Ok(Taken::Counted);
        }
        let is_session = matches!(plan.meter.window, WindowKind::Session { .. });
        let key = StateKey {
            subscription: index(at.subscription),
            meter: index(plan.index),
            price: price.map_or(NO_PRICE, index),
            dimensions: self.dimensions_of(plan, slots),
            period_start: period.start,
            window_start: window.start,
        };
        let arrival = match purpose {
            Purpose::Count(arrival) => arrival,
            Purpose::Withdraw(loss) => {
                let news = self.withdrawn.entry(key).or_default();
                *match loss {
                    Loss::Voided => &mut news.voided,
                    Loss::Amended => &mut news.amended,
                    Loss::Duplicate => &mut news.duplicates,
                } += 1;
                self.replaced.push(key);
                return Ok(Taken::Counted);
            }
        };
        let arrived = Arrived {
            late: arrival == Arrival::Late && !resolved,
            // An event amended within its window is one amended event.
            amended: arrival == Arrival::Amended && !self.replaced.contains(&key),
            resolved,
        };
        let by_moment = plan.needs_moment || price.is_some_and(|price| self.context.enricher.needs_transactions(price));
        let moment = by_moment.then(|| Moment {
            timestamp: at.t,
            ingested_at: at.event.ingested_at.unwrap_or(at.t),
            id: at.event.id.unwrap_or_default(),
            remaining: if is_level { self.remaining(at.subscription, plan, slots, at.t, period) } else { 0 },
        });
        let found = Match {
            subscription: key.subscription,
            meter: key.meter,
            price: key.price,
            dimensions: key.dimensions,
            window: if is_session { NO_WINDOW } else { at.window.number },
            period: at.period.number,
            identity: at.identity,
            value: Measured::of(&value, plan.meter.aggregation),
            moment,
            arrived,
        };
        self.matches.write(self.context.parts.part(key.subscription), &found)?;
        Ok(Taken::Counted)
    }

    /// The number of an event's dimensions.
    fn dimensions_of(&mut self, plan: &MeterPlan<'r>, slots: &[Property<'_>]) -> u32 {
        if plan.meter.dimensions.is_empty() {
            return NO_DIMENSIONS;
        }
        self.text.clear();
        plan.write_dimensions(slots, &mut self.text);
        self.dimensions.intern(&self.text)
    }

    /// Nanoseconds for which a level lasts that begins at `t`.
    fn remaining(&self, subscription: usize, plan: &MeterPlan<'r>, slots: &[Property<'_>], t: Timestamp, period: Span) -> i64 {
        let reference = self.context.enricher.reference;
        let Some(subscription) = reference.subscriptions.get(subscription) else { return 0 };
        let end = reference.level_end(subscription, plan.index, t, period, &plan.dimension_values(slots));
        end.nanos().saturating_sub(t.nanos())
    }

    fn dead_letter(&mut self, event: &EventRef<'_>, meter: Option<&str>, rejection: &Rejection) {
        let raw = event.problem.and_then(|problem| problem.raw.as_deref());
        let json = event_json(event, raw);
        let event_id = match event.id.filter(|id| !id.is_empty()) {
            Some(id) => id.to_owned(),
            // Rows without an id are told apart by their content.
            None => format!("unreadable:{:016x}", xxh3_128(json.as_bytes()) >> 64),
        };
        self.dead_letters.push(DeadLetter {
            key: DeadLetterKey {
                tenant_id: event.tenant_id.unwrap_or_default().to_owned(),
                event_id,
                meter_id: meter.unwrap_or_default().to_owned(),
                reason: rejection.reason,
            },
            detail: rejection.detail.clone(),
            event: json,
            event_time: event.timestamp,
        });
    }

    /// Adds what another thread has seen.
    pub fn merge(&mut self, other: Matcher<'c, 'r>) {
        let renamed: Vec<u32> = other.dimensions.texts().iter().map(|text| self.dimensions.intern(text)).collect();
        let rename = |number: u32| renamed.get(number as usize).copied().unwrap_or_default();
        for (key, news) in other.withdrawn {
            self.withdrawn.entry(StateKey { dimensions: rename(key.dimensions), ..key }).or_default().merge(news);
        }
        for shard in other.shards {
            let dimensions = shard.dimensions.into_iter().map(rename).collect();
            self.shards.push(Shard { dimensions, ..shard });
        }
        self.shards.push(Shard { matches: other.matches, dimensions: renamed });
        self.dead_letters.extend(other.dead_letters);
        self.events.merge(&other.events);
        self.usage.merge(&other.usage);
        self.held.merge(other.held);
        self.ingested_until = self.ingested_until.max(other.ingested_until);
        self.times.merge(other.times);
        self.visited.merge(other.visited);
        for (hash, count) in other.copies {
            *self.copies.entry(hash).or_default() += count;
        }
        self.read_again.extend(other.read_again);
    }

    /// All matches, once everything is read.
    pub fn take_matches(&mut self) -> AllMatches<'c, 'r> {
        let mut shards = std::mem::take(&mut self.shards);
        let own = std::mem::replace(&mut self.matches, Matches::new(&self.context.parts, None));
        let dimensions = (0..index(self.dimensions.texts().len())).collect();
        shards.push(Shard { matches: own, dimensions });
        AllMatches::new(self.context, shards)
    }
}
