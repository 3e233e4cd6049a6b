//! What `trueup explain` says to people.

use std::fmt::Write as _;

use anyhow::Result;

use super::output::{Style, counted, number, table};
use super::range::shell_path;
use crate::audit::explain::{Asked, Change, Explanation, Figures, Row, validity};
use crate::config::Job;
use crate::model::aggregate::Values;
use crate::model::decimal::Decimal;
use crate::model::meter::{ChargeOn, Input, Meter};
use crate::model::price::Price;
use crate::model::price_lines::Line;
use crate::model::timestamp::Timestamp;
use crate::pipeline::price_steps::PriceStep;

/// Events of a list that are shown without `--all`.
pub const SHOWN: usize = 20;

/// The answers, one after another.
///
/// # Errors
/// Where an amount overflows.
pub fn text(job: &Job, asked: &Asked, answers: &[Explanation<'_>], style: Style) -> Result<String> {
    let mut out = String::new();
    for answer in answers {
        let writer = Writer { job, asked, answer, style };
        writer.write(&mut out)?;
    }
    Ok(out)
}

struct Writer<'w> {
    job: &'w Job,
    asked: &'w Asked,
    answer: &'w Explanation<'w>,
    style: Style,
}

impl Writer<'_> {
    fn write(&self, out: &mut String) -> Result<()> {
        let title = self.style.bold(&format!("trueup explain {}:", self.job.name));
        let of = format!("{} / {} / {}", self.answer.tenant_id, self.asked.subscription, self.asked.meter);
        if !out.is_empty() {
            out.push('\n');
        }
        writeln!(out, "{title} {of}")?;
        for row in &self.answer.rows {
            self.row(out, row)?;
        }
        if self.answer.rows.is_empty() {
            let what = if self.asked.of_period { "billing period" } else { "window" };
            let of = match (&self.asked.price, &self.asked.dimensions) {
                (None, None) => "",
                _ => " of that price and those dimensions (without --price and --dimensions, all rows are shown)",
            };
            writeln!(out, "\n  no row{of}: nothing counts in the {what} at {}, and nothing is stored", self.asked.at)?;
        }
        self.set_aside(out)?;
        self.reference(out)
    }

    fn field(&self, out: &mut String, name: &str, says: &str) -> Result<()> {
        writeln!(out, "  {} {says}", self.style.dim(&format!("{name:<12}")))?;
        Ok(())
    }

    fn heading(&self, out: &mut String, name: &str, says: &str) -> Result<()> {
        let heading = if says.is_empty() { self.style.bold(name) } else { format!("{} {says}", self.style.bold(name)) };
        writeln!(out, "\n  {heading}")?;
        Ok(())
    }

    fn row(&self, out: &mut String, row: &Row<'_>) -> Result<()> {
        out.push('\n');
        let period = &row.key.period;
        let start = if self.asked.of_period { period.period_start } else { row.key.window_start };
        let figures = row.computed.as_ref().or(row.stored.as_ref());
        let end = figures.map_or(String::new(), |figures| format!(" to {}", figures.end));
        self.field(out, if self.asked.of_period { "period" } else { "window" }, &format!("{start}{end}"))?;
        if let Some(figures) = figures.filter(|_| !self.asked.of_period) {
            self.field(out, "period", &format!("{} to {}", period.period_start, figures.period_end))?;
        }
        if &*period.dimensions != "{}" {
            self.field(out, "dimensions", &period.dimensions)?;
        }
        if !period.price_id.is_empty() {
            self.field(out, "price", &period.price_id)?;
        }
        if let Some(figures) = &row.computed {
            self.field(out, "quantity", &figures.values.quantity.to_string())?;
            self.field(out, "cost", &format!("{} {}", figures.values.cost, figures.currency))?;
            if let Some(amount) = figures.amount {
                self.field(out, "amount", &format!("{amount} {}", figures.currency))?;
            }
        }
        self.stored(out, row)?;
        self.steps(out, row)?;
        self.events(out, row)?;
        self.history(out, row)
    }

    /// How the stored row compares.
    fn stored(&self, out: &mut String, row: &Row<'_>) -> Result<()> {
        let shown = |figures: &Figures| {
            let amount = figures.amount.map_or(String::new(), |amount| format!(", amount {amount}"));
            format!("quantity {}, cost {} {}{amount}", figures.values.quantity, figures.values.cost, figures.currency)
        };
        let remedy = format!("trueup plan {} shows what a run would change", shell_path(&self.job.path));
        let says = match (&row.stored, &row.computed) {
            (Some(stored), Some(computed)) if stored.agrees(computed) => "the same".to_owned(),
            (Some(stored), Some(computed)) if stored.customer_id != computed.customer_id => self.style.yellow(&format!(
                "differs: {}, customer {} (now {}); {remedy}",
                shown(stored),
                stored.customer_id,
                computed.customer_id
            )),
            (Some(stored), Some(_)) => self.style.yellow(&format!("differs: {}; {remedy}", shown(stored))),
            (Some(stored), None) => {
                self.style.yellow(&format!("{}, but nothing counts here now: a run would retract it", shown(stored)))
            }
            (None, Some(_)) => self.style.yellow("not yet: a run would insert it"),
            (None, None) => "no more: it was retracted, and nothing counts here".to_owned(),
        };
        self.field(out, "stored", &says)?;
        let closed = row.stored.as_ref().and_then(|stored| stored.closed_at);
        closed.map_or(Ok(()), |closed_at| self.field(out, "closed", &format!("{closed_at}: a run does not write over it")))
    }

    fn steps(&self, out: &mut String, row: &Row<'_>) -> Result<()> {
        let (Some(figures), Some(after)) = (&row.computed, &row.steps.after) else {
            return Ok(());
        };
        let model = row.price.map_or("", |price| price.model.name());
        let mut lines = Lines::default();
        match &row.steps.before {
            Some(before) => {
                lines.step("the period to the window's end", after);
                lines.step("the period to the window's start", before);
                lines.total("the window", &format!("{} - {}", after.cost, before.cost), figures.values.cost);
            }
            None => {
                let of = if self.asked.of_period { "the period" } else { "the window" };
                lines.step(of, after);
                let adjusted = lines.adjust(&row.steps.adjustments);
                if adjusted {
                    lines.total("due", "", figures.amount.unwrap_or(figures.values.cost));
                }
            }
        }
        self.heading(out, "price", &self.style.dim(model))?;
        out.push_str(&lines.render(self.style));
        Ok(())
    }

    fn events(&self, out: &mut String, row: &Row<'_>) -> Result<()> {
        if row.computed.is_none() {
            return Ok(());
        }
        let by_event = row.events.events().any(|event| event.fee.is_some());
        let has_value = row.events.events().any(|event| event.value.is_some());
        self.heading(out, "events", &self.style.dim(&format!("{} counted", number(row.events.total))))?;
        if let Some(carried) = row.carried_in {
            writeln!(out, "    carried in: a level of {} that earlier events left adds {}", carried.level, carried.quantity)?;
        }
        let optional = |value: Option<Decimal>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
        let mut header = vec!["    time", "ingested", "id"];
        if has_value {
            header.push("value");
        }
        if by_event {
            header.extend(["charged", "fee"]);
        }
        let mut rows = Vec::new();
        for event in row.events.events() {
            let ingested = event.ingested_at.map_or_else(|| "-".to_owned(), |t| t.to_string());
            let mut cells = vec![format!("    {}", event.timestamp), ingested, event.id.clone()];
            if has_value {
                cells.push(event.value.clone().unwrap_or_else(|| "-".to_owned()));
            }
            if by_event {
                cells.extend([optional(event.charged), optional(event.fee)]);
            }
            rows.push(cells);
        }
        if !rows.is_empty() {
            out.push_str(&table(&header, &rows, &[3, 4, 5], self.style));
        }
        self.folded(out, row.events.total, rows.len())
    }

    fn folded(&self, out: &mut String, total: u64, shown: usize) -> Result<()> {
        let hidden = total.saturating_sub(shown as u64);
        if hidden > 0 {
            writeln!(out, "    {}", self.style.dim(&format!("… and {} more: --all shows them", number(hidden))))?;
        }
        Ok(())
    }

    fn history(&self, out: &mut String, row: &Row<'_>) -> Result<()> {
        self.heading(out, "history", &self.style.dim(&counted(row.history.len() as u64, "correction")))?;
        if row.history.is_empty() {
            return Ok(());
        }
        let values = |values: Option<Values>, of: fn(Values) -> Decimal| {
            values.map_or_else(|| "-".to_owned(), |values| of(values).to_string())
        };
        let line = |change: &Change| {
            let run = change.run.as_ref();
            let when = run.map_or_else(|| "-".to_owned(), |run| moment(run.finished_at));
            let causes: Vec<_> = change.causes.iter().map(|(cause, count)| format!("{cause} {count}")).collect();
            vec![
                format!("    {}", change.run_id),
                when,
                change.kind.clone(),
                values(change.before, |values| values.quantity),
                values(change.after, |values| values.quantity),
                values(change.before, |values| values.cost),
                values(change.after, |values| values.cost),
                if causes.is_empty() { "-".to_owned() } else { causes.join(", ") },
            ]
        };
        let rows: Vec<_> = row.history.iter().map(line).collect();
        let header = ["    run", "when", "kind", "quantity", "becomes", "cost", "becomes", "causes"];
        out.push_str(&table(&header, &rows, &[3, 4, 5, 6], self.style));
        Ok(())
    }

    fn set_aside(&self, out: &mut String) -> Result<()> {
        let list = &self.answer.set_aside;
        if list.total == 0 {
            return Ok(());
        }
        self.heading(out, "set aside", &self.style.dim(&format!("{} that do not count", counted(list.total, "event"))))?;
        let mut rows = Vec::new();
        for event in list.events() {
            let (why, detail) = event.why.describe();
            let ingested = event.ingested_at.map_or_else(|| "-".to_owned(), |t| t.to_string());
            rows.push(vec![format!("    {}", event.timestamp), ingested, event.id.clone(), why.to_owned(), detail.to_owned()]);
        }
        out.push_str(&table(&["    time", "ingested", "id", "why", ""], &rows, &[], self.style));
        self.folded(out, list.total, rows.len())
    }

    fn reference(&self, out: &mut String) -> Result<()> {
        self.heading(out, "reference", "")?;
        let mut line = |name: &str, says: String| writeln!(out, "    {} {says}", self.style.dim(&format!("{name:<12}")));
        match self.answer.subscription {
            Some(subscription) => {
                for (external, span) in &self.answer.customers {
                    line("customer", format!("{external} is {}, valid {}", subscription.customer_id, validity(*span)))?;
                }
                if self.answer.customers.is_empty() {
                    line("customer", format!("{} is not in the customers table", subscription.customer_id))?;
                }
                let cycle = subscription.cycle;
                let anchor = cycle.anchor.map_or(String::new(), |anchor| format!(" from {anchor}"));
                line(
                    "subscription",
                    format!(
                        "{} on plan {} in {}, billed by {}{anchor} ({}), active {}",
                        subscription.id,
                        subscription.plan_id,
                        subscription.currency,
                        cycle.length.name(),
                        cycle.timezone.name(),
                        validity(subscription.active)
                    ),
                )?;
            }
            None => line("subscription", format!("{} is not in the subscriptions table any more", self.asked.subscription))?,
        }
        match self.answer.meter {
            Some(meter) => line("meter", describe_meter(meter))?,
            None => line("meter", format!("{} is not in the meters table any more", self.asked.meter))?,
        }
        let mut prices: Vec<&Price> = self.answer.rows.iter().filter_map(|row| row.price).collect();
        prices.dedup_by_key(|price| &price.id);
        for price in prices {
            line("price", describe_price(price))?;
        }
        Ok(())
    }
}

/// A wall-clock time, to the second.
fn moment(t: Timestamp) -> String {
    t.utc().format("%Y-%m-%d %H:%M:%SZ").to_string()
}

fn describe_meter(meter: &Meter) -> String {
    let of = match &meter.input {
        Input::Event => String::new(),
        Input::Property(property) => format!(" of {property}"),
        Input::Expression(expression) => format!(" of {}", expression.text()),
    };
    let filters: Vec<_> = meter.filters.iter().map(ToString::to_string).collect();
    let filters = if filters.is_empty() { String::new() } else { format!(" where {}", filters.join(" and ")) };
    let charge_on = match meter.charge_on {
        ChargeOn::Period => "charged on the period",
        ChargeOn::WindowSum => "charged on the sum of windows",
        ChargeOn::Window => "each window charged on its own",
    };
    let (id, aggregation, event) = (&meter.id, meter.aggregation.name(), &meter.event_name);
    format!("{id}: {aggregation}{of} over {event}{filters}; window {}; {charge_on}", meter.window)
}

fn describe_price(price: &Price) -> String {
    let matches: Vec<_> = price.matches.iter().map(|(name, value)| format!("{name} = {value}")).collect();
    let matches = if matches.is_empty() { String::new() } else { format!(", for {}", matches.join(", ")) };
    format!("{}: {} on plan {}{matches}, valid {}", price.id, price.model.name(), price.plan_id, validity(price.valid))
}

/// Lines of a price in columns: what, arithmetic, amount.
#[derive(Default)]
struct Lines(Vec<[String; 3]>);

impl Lines {
    fn step(&mut self, of: &str, step: &PriceStep) {
        let events = if step.events == 0 { String::new() } else { format!(", {}", counted(step.events, "event")) };
        self.0.push([format!("{of}: {}{events}", step.quantity), String::new(), String::new()]);
        step.lines.iter().for_each(|line| self.line(line));
        if step.lines.iter().filter(|line| line.amount.is_some()).count() != 1 {
            self.total("  together", "", step.cost);
        }
    }

    fn line(&mut self, line: &Line) {
        let percent = if line.per_hundred { "%" } else { "" };
        let arithmetic = match (line.quantity, line.unit_amount, line.amount) {
            (Some(quantity), Some(unit), _) => format!("{quantity} x {unit}{percent}"),
            (Some(quantity), None, None) => format!("leaves {quantity}"),
            (Some(quantity), None, Some(_)) => quantity.to_string(),
            (None, ..) => String::new(),
        };
        self.0.push([format!("  {}", line.says), arithmetic, line.amount.map_or(String::new(), |amount| amount.to_string())]);
    }

    /// Whether there was anything to add.
    fn adjust(&mut self, lines: &[Line]) -> bool {
        lines.iter().for_each(|line| self.line(line));
        !lines.is_empty()
    }

    fn total(&mut self, of: &str, arithmetic: &str, amount: Decimal) {
        self.0.push([of.to_owned(), arithmetic.to_owned(), amount.to_string()]);
    }

    fn render(self, style: Style) -> String {
        let width = |at: usize| self.0.iter().filter_map(|line| line.get(at)).map(|cell| cell.chars().count()).max().unwrap_or(0);
        // A step's own line runs over the columns beside it.
        let labels = self.0.iter().filter(|[_, arithmetic, amount]| !(arithmetic.is_empty() && amount.is_empty()));
        let label = labels.map(|[label, ..]| label.chars().count()).max().unwrap_or(0);
        let (arithmetic_width, amount_width) = (width(1), width(2));
        let mut out = String::new();
        for [text, arithmetic, amount] in self.0 {
            let pad = " ".repeat(label.saturating_sub(text.chars().count()));
            let line = format!("    {text}{pad}  {arithmetic:>arithmetic_width$}  {amount:>amount_width$}");
            let is_step = arithmetic.is_empty() && amount.is_empty();
            let line = line.trim_end();
            out.push_str(&if is_step { style.dim(line) } else { line.to_owned() });
            out.push('\n');
        }
        out
    }
}
