//! Filling tables that are empty with rows that are sorted, page by page and at the same time:
//! several times faster than inserting them.

use anyhow::{Context as _, Result, bail};
use rusqlite::Transaction;

use super::bind::{NewRows, Rows, Target, Value};
use super::pages::{Layout, PageWriter, Pages, Tree};
use super::record::Record;

/// Whether a table can be filled: it is empty, nobody has given it an index, a trigger or columns of
/// their own, and SQLite lets it be.
///
/// # Errors
/// Where the database cannot be read.
pub(super) fn can_fill(transaction: &Transaction<'_>, NewRows { table, columns, .. }: &NewRows<'_>) -> Result<bool> {
    let others = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE type <> 'table' AND tbl_name = ?1)";
    let has_others: bool = transaction.query_row(others, [table], |row| row.get(0))?;
    let first = format!("SELECT EXISTS (SELECT 1 FROM {table})");
    let has_rows: bool = transaction.query_row(&first, [], |row| row.get(0))?;
    Ok(!has_others && !has_rows && PageWriter::is_possible(transaction)? && Shape::of(transaction, table, columns)?.is_some())
}

/// Fills tables that [`can_fill`] has found good. The transaction can write nothing more then, and
/// its connection is to forget the pages that it knows (`PRAGMA shrink_memory`) once it ended.
///
/// # Errors
/// Where a row cannot be made, or the database cannot be written.
pub(super) fn fill(transaction: &mut Transaction<'_>, tables: [NewRows<'_>; 2]) -> Result<()> {
    let writer = PageWriter::new(transaction)?;
    let make = |NewRows { table, columns, give }| {
        let shape = Shape::of(writer.transaction(), table, &columns)?;
        let shape = shape.with_context(|| format!("{table} cannot be filled: this is a bug in trueup"))?;
        Ok(move |pages: &Pages<'_>| {
            let mut filled = Filled::new(&shape, pages);
            give(&mut Rows::new(columns.len(), &mut filled))?;
            filled.tree.finish(pages, shape.root)
        })
    };
    let makers = tables.into_iter().map(make).collect::<Result<Vec<_>>>()?;
    writer.write(makers)
}

/// How a table is stored.
struct Shape {
    root: u32,
    layout: Layout,
    /// Which column of the record each given one is; none for the number of the row.
    columns: Vec<Option<usize>>,
    stored: usize,
}

impl Shape {
    /// `None` where a table has other columns than those given.
    fn of(transaction: &Transaction<'_>, table: &str, given: &[&str]) -> Result<Option<Shape>> {
        let root = "SELECT rootpage FROM sqlite_schema WHERE type = 'table' AND name = ?1";
        let root = transaction.query_row(root, [table], |row| row.get(0))?;
        let kind = "SELECT wr FROM pragma_table_list WHERE schema = 'main' AND name = ?1";
        let has_key: bool = transaction.query_row(kind, [table], |row| row.get(0))?;
        // Columns that are made when they are read are not stored.
        let stored = "SELECT name, pk FROM pragma_table_xinfo(?1) WHERE hidden <> 2 ORDER BY iif(?2 AND pk > 0, pk, 1000), cid";
        let mut statement = transaction.prepare(stored)?;
        let stored = statement.query_map((table, has_key), |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)))?;
        let stored = stored.collect::<rusqlite::Result<Vec<_>>>()?;
        let place = |column: &&str| {
            let (at, (_, key)) = stored.iter().enumerate().find(|(_, (name, _))| name == column)?;
            // A number that is the key is stored as the number of its row.
            Some(Some(at).filter(|_| has_key || *key == 0))
        };
        let columns: Option<Vec<_>> = given.iter().map(place).collect();
        let layout = if has_key { Layout::Key } else { Layout::Rowid };
        let shape = |columns| Shape { root, layout, columns, stored: stored.len() };
        Ok(columns.filter(|columns| columns.len() == stored.len()).map(shape))
    }
}

/// A table that is being filled.
struct Filled<'f, 'p> {
    shape: &'f Shape,
    pages: &'f Pages<'p>,
    tree: Tree,
    record: Record,
    rowid: i64,
}

impl<'f, 'p> Filled<'f, 'p> {
    fn new(shape: &'f Shape, pages: &'f Pages<'p>) -> Self {
        Filled { shape, pages, tree: Tree::new(shape.layout), record: Record::new(shape.stored), rowid: 0 }
    }
}

impl Target for Filled<'_, '_> {
    fn set(&mut self, place: usize, value: Value<'_>) -> Result<()> {
        match (self.shape.columns.get(place), value) {
            (Some(Some(column)), value) => self.record.set(*column, value),
            (Some(None), Value::Integer(number)) => self.rowid = number,
            _ => bail!("column {place} cannot be filled: this is a bug in trueup"),
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        self.tree.add(self.pages, self.rowid, self.record.bytes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rusqlite::Connection;
    use tempfile::TempDir;

    use super::*;

    type Row = (i64, String, Option<i64>);

    /// Two empty tables, one by key and one by number, beside another table that has pages already.
    fn empty(page_size: u32, journal: &str) -> (TempDir, Connection) {
        let folder = tempfile::tempdir().unwrap();
        let connection = Connection::open(folder.path().join("filled.db")).unwrap();
        connection.pragma_update(None, "page_size", page_size).unwrap();
        connection.pragma_update(None, "journal_mode", journal).unwrap();
        let tables = "CREATE TABLE other (text TEXT);
             CREATE TABLE by_key (number INTEGER, text TEXT, doubled GENERATED ALWAYS AS (2 * number) VIRTUAL,
                 key TEXT, PRIMARY KEY (key, number)) WITHOUT ROWID;
             CREATE TABLE by_number (text TEXT, id INTEGER PRIMARY KEY, number INTEGER);
             CREATE INDEX of_other ON other (text);";
        connection.execute_batch(tables).unwrap();
        (folder, connection)
    }

    /// Fills both with the same rows, and opens the database anew.
    fn filled((folder, mut connection): (TempDir, Connection), rows: &[Row]) -> (TempDir, Connection) {
        let mut transaction = connection.transaction().unwrap();
        transaction.execute("INSERT INTO other VALUES (?1)", ["x".repeat(5000)]).unwrap();
        fill(&mut transaction, tables(rows)).unwrap();
        transaction.commit().unwrap();
        drop(connection);
        let connection = Connection::open(folder.path().join("filled.db")).unwrap();
        (folder, connection)
    }

    fn tables(rows: &[Row]) -> [NewRows<'_>; 2] {
        let by_key = |out: &mut Rows<'_>| {
            rows.iter().try_for_each(|(id, text, number)| {
                out.text(&format!("{id:09}"))?;
                out.integer(number.unwrap_or_default())?;
                out.text(text)?;
                out.write()
            })
        };
        let by_number = |out: &mut Rows<'_>| {
            rows.iter().try_for_each(|(id, text, number)| {
                out.integer(*id)?;
                out.optional(*number, Rows::integer)?;
                out.text(text)?;
                out.write()
            })
        };
        [
            NewRows { table: "by_key", columns: vec!["key", "number", "text"], give: Box::new(by_key) },
            NewRows { table: "by_number", columns: vec!["id", "number", "text"], give: Box::new(by_number) },
        ]
    }

    fn is_sound(connection: &Connection) {
        let found: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
        assert_eq!(found, "ok");
    }

    /// Reads both tables, and looks each row up by its key.
    fn assert_holds(connection: &Connection, rows: &[Row]) {
        is_sound(connection);
        let mut all = connection.prepare("SELECT id, text, number FROM by_number ORDER BY id").unwrap();
        let all = all.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
        assert_eq!(all.collect::<rusqlite::Result<Vec<Row>>>().unwrap(), rows);
        let mut all = connection.prepare("SELECT key, text, number, doubled FROM by_key ORDER BY key, number").unwrap();
        let all = all.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))).unwrap();
        let by_key: Vec<(String, String, i64, i64)> = all.collect::<rusqlite::Result<_>>().unwrap();
        let expected = rows.iter().map(|(id, text, number)| {
            let number = number.unwrap_or_default();
            (format!("{id:09}"), text.clone(), number, number.wrapping_mul(2))
        });
        assert_eq!(by_key, expected.collect::<Vec<_>>());
        let mut one = connection.prepare("SELECT count(*) FROM by_number WHERE id = ?1").unwrap();
        let mut of_key = connection.prepare("SELECT count(*) FROM by_key WHERE key = ?1").unwrap();
        for (id, ..) in rows {
            assert_eq!(one.query_row([id], |row| row.get::<_, i64>(0)).unwrap(), 1);
            assert_eq!(of_key.query_row([format!("{id:09}")], |row| row.get::<_, i64>(0)).unwrap(), 1);
        }
    }

    /// What is written later finds its place.
    fn assert_goes_on(connection: &Connection, rows: &[Row]) {
        for (id, text, number) in rows {
            let key = format!("{id:09}");
            if id % 3 == 0 {
                connection.execute("DELETE FROM by_key WHERE key = ?1", [&key]).unwrap();
                connection.execute("DELETE FROM by_number WHERE id = ?1", [id]).unwrap();
            } else {
                let other = (format!("{key}+"), text.repeat(2), number.unwrap_or_default());
                connection.execute("INSERT INTO by_key (key, text, number) VALUES (?1, ?2, ?3)", other).unwrap();
                connection.execute("UPDATE by_number SET text = ?2 WHERE id = ?1", (id, text.repeat(2))).unwrap();
            }
        }
        is_sound(connection);
    }

    /// A row a window and billing period comes with the next day.
    #[test]
    fn a_row_here_and_there_splits_few_pages() {
        let rows: Vec<Row> = (1..=20_000).map(|id| (id, "x".repeat(200), Some(id))).collect();
        let (_folder, connection) = filled(empty(8192, "delete"), &rows);
        let pages = || connection.pragma_query_value(None, "page_count", |row| row.get::<_, i64>(0)).unwrap();
        let before = pages();
        for id in (1..=20_000).step_by(30) {
            let row = (format!("{id:09}+"), "x".repeat(200));
            connection.execute("INSERT INTO by_key (key, number, text) VALUES (?1, 0, ?2)", row).unwrap();
        }
        is_sound(&connection);
        assert!((pages() - before) * 20 < before, "{before} pages became {}", pages());
    }

    /// Every number of rows, so that every level ends in every way that it can.
    #[test]
    fn tables_of_any_size_are_sound() {
        for count in 0..250 {
            let rows: Vec<Row> = (1..=count).map(|id| (id, "x".repeat(if id % 7 == 0 { 100 } else { 40 }), Some(id))).collect();
            let (_folder, connection) = filled(empty(512, "delete"), &rows);
            assert_holds(&connection, &rows);
        }
    }

    /// Whatever part of a row is in its page; in databases that have free pages.
    #[test]
    fn rows_of_any_length_are_sound() {
        for (page_size, lengths) in [(512, 0..1200), (1024, 0..2200), (65_536, 16_300..16_420), (65_536, 65_400..65_500)] {
            let (folder, connection) = empty(page_size, "delete");
            connection
                .execute_batch("CREATE TABLE gone (a); INSERT INTO gone VALUES (zeroblob(90000)); DROP TABLE gone")
                .unwrap();
            let rows: Vec<Row> = (1..).zip(lengths).map(|(id, length)| (id, "\0".repeat(length), Some(id % 2))).collect();
            let (_folder, connection) = filled((folder, connection), &rows);
            assert_holds(&connection, &rows);
        }
        let (_folder, connection) = filled(empty(65_536, "delete"), &[]);
        assert_holds(&connection, &[]);
    }

    #[test]
    fn the_same_connection_goes_on() {
        let rows: Vec<Row> = (1..=500).map(|id| (id, "x".repeat(100), Some(id))).collect();
        let (_folder, mut connection) = empty(1024, "delete");
        let mut transaction = connection.transaction().unwrap();
        fill(&mut transaction, tables(&rows)).unwrap();
        transaction.commit().unwrap();
        connection.execute_batch("PRAGMA shrink_memory").unwrap();
        assert_holds(&connection, &rows);
        assert_goes_on(&connection, &rows);
    }

    #[test]
    fn what_somebody_changed_is_not_filled() {
        let can_fill_after = |sql: &str| {
            let connection = Connection::open_in_memory().unwrap();
            connection.execute_batch(sql).unwrap();
            let transaction = connection.unchecked_transaction().unwrap();
            let tables = tables(&[]);
            tables.iter().all(|table| can_fill(&transaction, table).unwrap())
        };
        let tables = "CREATE TABLE by_key (key TEXT, number INTEGER, text TEXT, PRIMARY KEY (key, number)) WITHOUT ROWID;
             CREATE TABLE by_number (text TEXT, id INTEGER PRIMARY KEY, number INTEGER);";
        assert!(can_fill_after(tables));
        for changed in [
            "CREATE INDEX mine ON by_number (text)",
            "CREATE TRIGGER mine AFTER INSERT ON by_key BEGIN DELETE FROM by_number; END",
            "ALTER TABLE by_key ADD COLUMN note TEXT",
            "ALTER TABLE by_number RENAME COLUMN text TO note",
            "INSERT INTO by_number VALUES ('', 1, 1)",
        ] {
            assert!(!can_fill_after(&format!("{tables}{changed}")), "{changed}");
        }
        for pragma in ["encoding = 'UTF-16'", "auto_vacuum = FULL"] {
            assert!(!can_fill_after(&format!("PRAGMA {pragma};{tables}")), "{pragma}");
        }
    }

    /// A full disk, or rows that cannot be made: no thread waits for another one, nothing is left.
    #[test]
    fn what_fails_leaves_the_tables_empty() {
        let rows: Vec<Row> = (1..=20_000).map(|id| (id, "x".repeat(100), Some(id))).collect();
        let (folder, mut connection) = empty(1024, "delete");
        connection.pragma_update(None, "max_page_count", 1000).unwrap();
        let mut transaction = connection.transaction().unwrap();
        let error = fill(&mut transaction, tables(&rows)).unwrap_err();
        assert!(error.to_string().contains("full"), "{error}");
        drop(transaction);
        connection.pragma_update(None, "max_page_count", 1_000_000).unwrap();
        let mut transaction = connection.transaction().unwrap();
        let [by_key, by_number] = tables(&rows);
        let breaks_off = |out: &mut Rows<'_>| (by_number.give)(out).and_then(|()| bail!("no more rows"));
        let error = fill(&mut transaction, [by_key, NewRows { give: Box::new(breaks_off), ..by_number }]).unwrap_err();
        assert_eq!(error.to_string(), "no more rows");
        drop(transaction);
        drop(connection);
        let connection = Connection::open(folder.path().join("filled.db")).unwrap();
        assert_holds(&connection, &[]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn filled_tables_are_what_inserted_ones_are(
            page_size in prop::sample::select(vec![512_u32, 1024, 8192, 65_536]),
            journal in prop::sample::select(vec!["delete", "wal"]),
            rows in prop::collection::vec(
                (1_i64..1000, prop_oneof![9 => 0_usize..300, 1 => 0_usize..40_000], prop::option::of(prop_oneof![-2_i64..300, any::<i64>().prop_map(|n| n / 4)])),
                0..700,
            ),
        ) {
            let mut id = -500;
            let rows: Vec<Row> = rows.into_iter().map(|(step, length, number)| {
                id += step;
                (id, "é".repeat(length / 2), number)
            }).filter(|(id, ..)| *id > 0).collect();
            let (_folder, connection) = filled(empty(page_size, journal), &rows);
            assert_holds(&connection, &rows);
            assert_goes_on(&connection, &rows);
        }
    }
}
